"""Logits that fall with distance: the library computes them as the oracle does, and no kernel without them is asked."""

from __future__ import annotations

import pytest
import torch

from kvcompile.kernels import reference, sdpa
from kvcompile.kernels.dispatch import choose, serving
from kvcompile.kernels.layout import DenseView, Queries
from kvcompile.kernels.selfcheck.rows import Shape, draw
from kvcompile.kernels.spec import KernelSpec, plain
from kvcompile.runtime.observation import Observation

CPU = torch.device("cpu")
FLOAT = torch.float32


def spec(layout: str = "dense", group: int = 2, **over: object) -> KernelSpec:
    return KernelSpec(plain(layout, FLOAT), group, 8, 8, 8**-0.5, alibi=True, **over)  # type: ignore[arg-type]


def test_the_oracle_is_the_formula() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    positions, slopes = torch.tensor([[[0, 3, 4, 9, 12]]]).expand(1, 2, 5), torch.tensor([0.5, 0.03])
    logits = (q @ k.mT)[:, :, 0] * 8**-0.5 - slopes[:, None] * (12 - positions[0])
    expected = torch.einsum("bhn,bhnd->bhd", logits.softmax(-1), v)
    queries = Queries(q, torch.tensor([[12]]), slopes=slopes)
    got = reference.attend(queries, DenseView(k, v, positions), spec(group=1))
    torch.testing.assert_close(got[:, :, 0], expected)


@pytest.mark.parametrize("layout", ["dense", "ragged", "paged"])
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("variant", [{}, {"sink": True, "softcap": 3.0}, {"sliding_window": 9}, {"rounded": True}])
def test_the_library_agrees_with_the_oracle(layout: str, new: int, variant: dict[str, object]) -> None:
    kind = KernelSpec(plain(layout, FLOAT, 16 if layout == "paged" else 0), 2, 8, 8, 8**-0.5, alibi=True, **variant)  # type: ignore[arg-type]
    for padded in {False, layout != "dense" and new > 1}:
        sample = draw(kind, FLOAT, Shape(entries=24, new=new, padded=padded), CPU)
        expected = reference.attend(sample.queries, sample.view, kind)
        torch.testing.assert_close(sdpa.attend(sample.queries, sample.view, kind), expected, rtol=1e-4, atol=1e-5)


def test_no_kernel_without_it_is_asked() -> None:
    sample = draw(spec(), FLOAT, Shape(entries=8), CPU)
    with pytest.raises(ValueError, match="a slope of each head"):
        reference.attend(Queries(sample.queries.states, sample.queries.positions), sample.view, spec())
    assert serving(choose("auto", CPU), spec(), FLOAT).name == "sdpa"
    assert serving(choose("auto", CPU), spec(scores=True), FLOAT).name == "reference"


@pytest.mark.parametrize("rounded", [False, True])
def test_scores_see_what_attention_sees(rounded: bool) -> None:
    """Mean attention of an observation is what the oracle adds up."""
    kind = spec(scores=True, rounded=rounded)
    sample = draw(kind, FLOAT, Shape(entries=24, batch=1, new=4), CPU)
    view, queries = sample.view, sample.queries
    assert isinstance(view, DenseView)
    assert queries.slopes is not None
    sums = torch.zeros(2, view.keys.shape[2])
    reference.attend(queries, view, kind, sums)
    seen = Observation(
        queries=torch.unflatten(queries.states[0], 0, (2, 2)),
        query_positions=queries.positions[0],
        keys=view.keys[0],
        values=view.values[0],
        positions=view.positions[0].expand(2, -1),
        lengths=torch.full((2,), view.keys.shape[2]),
        tokens=int(queries.positions.max()) + 1,
        scale=kind.scale,
        slopes=queries.slopes.view(2, 2),
        rounded=rounded,
    )
    torch.testing.assert_close(seen.mean_attention(), sums / (2 * 4), rtol=1e-4, atol=1e-6)
