"""The C++ scorer gives what the reference gives, whatever the sizes; the same bits for any number of threads."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from ghosts import PLACES, RULE, SPECS, Case, case, check
from vectors import PATHS

from kvcompile.errors import KvcompileError
from kvcompile.kernels.cpp import build, simd
from kvcompile.kernels.cpp import ghost as generated
from kvcompile.kernels.dispatch import CPP
from kvcompile.kernels.reference.ghost import GhostSpec
from kvcompile.kernels.reference.ghost import ghost_scores as by_torch

pytestmark = pytest.mark.skipif(build.available() is not None, reason="no C++ compiler here")
ROUNDED = 0.01  # weights are rounded to bfloat16 where the processor multiplies that: 4 x 2^-9, and what it moves
LINEAR = GhostSpec(replace(RULE, chunk=256, band=8, scale=0.125), 3, 64, 64, "float32")  # of SmolLM2
specs = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def tolerance(spec: GhostSpec) -> float:
    return ROUNDED if spec.dtype == "bfloat16" else 2e-4


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(generated._kernel, SPECS))


@specs
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_scores_are_changes_of_the_output(spec: GhostSpec, place: tuple[int, int, int]) -> None:
    check(generated.ghost_scores, case(spec, *place), tolerance(spec))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_many_chunks(dtype: str) -> None:
    """The first one ragged, the last one short; three decimal places of bfloat16 are right on average."""
    c = case(replace(LINEAR, dtype=dtype), tokens=900, start=77)
    got, want = c.by(generated.ghost_scores), c.double().by(by_torch)
    error = (got - want).abs() / want
    assert error.max() < tolerance(c.spec)
    assert error.mean() < (2e-3 if dtype == "bfloat16" else 1e-5)


def test_no_bit_depends_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(LINEAR, tokens=1000, start=3, heads=3)
    scores = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        scores += [c.by(generated.ghost_scores), c.by(generated.ghost_scores)]
    assert all(torch.equal(scores[0], x) for x in scores[1:])


def test_passes_of_whole_chunks_are_one_pass() -> None:
    """To the bit."""
    c = case(LINEAR, tokens=600)
    parts = [c.passed(generated.ghost_scores, a, b) for a, b in ((0, 256), (256, 600))]
    assert torch.equal(torch.cat(parts, 1), c.by(generated.ghost_scores))


@pytest.mark.parametrize("path", [path for path in PATHS if path != "native"])
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[5], SPECS[6]], ids=lambda spec: spec.name)
def test_other_vectors(spec: GhostSpec, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX2 and plain vector code take the same way through the same text, and round no weights."""
    function = build.load(simd.prelude() + generated.source(spec), "ghost-flags", PATHS[path]).ghost
    function.argtypes, function.restype = (ctypes.c_char_p,), None
    monkeypatch.setattr(generated, "_kernel", lambda _: function)
    for place in PLACES:
        check(generated.ghost_scores, case(spec, *place))


def test_no_tokens_and_no_numbers() -> None:
    empty = case(SPECS[0], tokens=0, start=9)
    assert empty.by(generated.ghost_scores).shape == (2, 0)
    c = case(SPECS[0], tokens=40)
    c.keys[1, 20, 3] = torch.nan  # of the third chunk
    scores = c.by(generated.ghost_scores)
    assert scores[0].isfinite().all()
    assert scores[1].isnan().tolist() == [16 <= j < 24 for j in range(40)]


def wrong(c: Case) -> dict[str, Case]:
    keys, values = c.sinks
    return {
        "ghosts": replace(c, ghosts=c.ghosts[:, :, 1:]),
        "keys": replace(c, keys=c.keys.half()),
        "values": replace(c, values=c.values[:, :-1]),
        "keys of sinks": replace(c, sinks=(keys[:1], values)),
        "values of sinks": replace(c, sinks=(keys, values[:, :-1])),
        "queries": replace(c, queries=c.queries.transpose(2, 3)),
    }


@pytest.mark.parametrize("name", wrong(case(SPECS[0])))
def test_it_refuses_what_it_would_misread(name: str) -> None:
    with pytest.raises(KvcompileError, match=f"a kernel reads {name}"):
        wrong(case(SPECS[0]))[name].by(CPP.ghost)


def test_torch_scores_in_other_dtypes() -> None:
    c = case(SPECS[0]).double()
    assert torch.equal(c.by(CPP.ghost), c.by(by_torch))


def test_the_backend_has_it() -> None:
    def lines(spec: GhostSpec) -> list[str]:
        (text,) = CPP.sources.ghost(spec).values()
        return text.splitlines()

    assert CPP.ghost is generated.ghost_scores
    assert not CPP.sources.ghost(replace(LINEAR, dtype="float64"))
    assert lines(LINEAR) == lines(replace(LINEAR))
    for absent in ("tanh", "learned", "__AVX512BF16__"):
        assert not any(absent in line for line in lines(LINEAR)), absent
