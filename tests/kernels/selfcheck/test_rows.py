"""Rows that a check draws: what a spec says of them, readable where they are, and noise everywhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvcompile.kernels import reference
from kvcompile.kernels.layout import DenseView, PagedView, RaggedView, parts
from kvcompile.kernels.selfcheck.rows import Shape, draw
from kvcompile.kernels.spec import KernelSpec, Part, plain
from kvcompile.plan.storage import Codec

CPU = torch.device("cpu")
KIVI = Codec("int4", "channel", 32), Codec("int4", "token", 32)
INT8 = Codec("int8", "token"), Codec("int8", "token")
PARTS = {
    "dense": plain("dense", "float32"),
    "ragged": plain("ragged", "float16"),
    "paged": plain("paged", "float32", 16),
    "codes and residual": (Part("ragged", *KIVI), *plain("dense", "float32")),
    "pages of codes": (Part("paged", *KIVI, 32), *plain("ragged", "float32")),
    "tiers": (Part("ragged", *INT8), Part("ragged", *KIVI), *plain("ragged", "float32")),
    "dense codes": (Part("dense", *KIVI), *plain("dense", "float32")),
}
LAYOUTS = {"dense": DenseView, "ragged": RaggedView, "paged": PagedView}


def spec_of(name: str, **options) -> KernelSpec:
    return KernelSpec(PARTS[name], 2, 32, 32, 0.2, **options)


@pytest.mark.parametrize("name", PARTS)
def test_rows_are_as_the_spec_says(name: str) -> None:
    """Every row reads as numbers, its positions ascend, and its last entries are those of the new tokens."""
    spec, shape = spec_of(name), Shape(70, new=3)
    sample = draw(spec, torch.float32, shape, CPU)
    for segment, part in zip(parts(sample.view), spec.parts, strict=True):
        assert isinstance(segment, LAYOUTS[part.layout])
    for b in range(shape.batch):
        for h in range(shape.heads):
            keys, values, positions = reference.row(sample.view, spec, b, h)
            assert len(keys) == len(values) == len(positions) >= 32
            assert bool(keys.isfinite().all())
            assert bool(values.isfinite().all())
            assert bool((positions.diff() > 0).all())
            assert positions[-3:].tolist() == sample.queries.positions[b].tolist()
            assert len(positions) < int(positions[-1]) + 1, "no gap: nothing looks evicted"


def test_rows_differ_in_length_where_they_may() -> None:
    ragged, dense = (parts(draw(spec_of(name), torch.float32, Shape(70), CPU).view)[0] for name in ("ragged", "dense"))
    assert len(set(ragged.lengths)) == 4
    assert dense.keys.shape[:3] == (2, 2, 70)


@pytest.mark.parametrize("name", ["dense", "ragged", "paged"])
def test_what_no_kernel_may_read_is_no_number(name: str) -> None:
    view = parts(draw(spec_of(name), torch.float32, Shape(70), CPU).view)[0]
    assert bool(view.keys.isfinite().all()) == (name == "dense"), "slices of dense rows end before the noise"
    if name == "dense":
        behind = view.keys.as_strided((1,), (1,), view.keys.storage_offset() + 70 * 32)
        assert bool(behind.isnan().all())


def test_padding_has_no_entry() -> None:
    sample = draw(spec_of("ragged"), torch.float32, Shape(70, new=3, padded=True), CPU)
    assert sample.queries.valid is not None
    assert sample.queries.valid.tolist() == [[True] * 3, [False, True, True]]
    _, _, positions = reference.row(sample.view, spec_of("ragged"), 1, 0)
    assert positions[-2:].tolist() == sample.queries.positions[1, 1:].tolist()
    assert int(sample.queries.positions[1, 0]) not in positions.tolist()


def test_values_of_a_latent_are_the_end_of_its_keys() -> None:
    spec = replace(spec_of("paged"), latent=True, value_dim=24)
    view = parts(draw(spec, torch.float32, Shape(40), CPU).view)[0]
    assert view.heads == 1
    assert view.values.data_ptr() == view.keys.data_ptr() + 8 * 4


def test_one_seed_is_one_sample() -> None:
    one, two, other = (draw(spec_of("tiers"), torch.bfloat16, Shape(40), CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(one.queries.states, two.queries.states)
    assert not torch.equal(one.queries.states, other.queries.states)
    assert one.queries.states.dtype == torch.bfloat16
