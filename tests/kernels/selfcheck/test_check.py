"""A check finds what is wrong with a kernel, and who is faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import kernels_to_check as toys
import pytest
import torch
from kernels_to_check import CPU, SPEC, backend

from kvcompile.errors import KvcompileError
from kvcompile.kernels import reference, sdpa
from kvcompile.kernels.cpp import build
from kvcompile.kernels.dispatch import CPP
from kvcompile.kernels.selfcheck import check as checking
from kvcompile.kernels.selfcheck.check import check
from kvcompile.kernels.spec import Part, plain
from kvcompile.plan.storage import Codec

SUMMED = replace(SPEC, scores=True)


@pytest.fixture
def slow_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def library(*arguments: object) -> None:
        time.sleep(0.01)

    monkeypatch.setattr(checking.sdpa, "attend", library)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_right_and_faster_is_taken(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "times", lambda *_: (1e-3, 2e-3))
    verdict = check(backend(), replace(SPEC, parts=plain("ragged", dtype)), dtype, CPU)
    assert verdict.right
    assert verdict.taken
    assert 0 < verdict.error < checking.TOLERANCE[dtype] / 4
    assert verdict.reason == "faster than the library here, 1 ms beside 2 ms"


@pytest.mark.parametrize(
    ("attend", "spec", "where"),
    [
        (toys.forgets_the_newest, SPEC, "one new token"),
        (toys.wrong_for_several, SPEC, "several new tokens"),
        (toys.wrong_for_long_rows, SPEC, "one new token, a long row"),
        (toys.wrong_sums, SUMMED, "one new token"),
        (toys.unwritten, SPEC, "several new tokens"),
        (toys.of_another_dtype, SPEC, "one new token"),
    ],
)
def test_what_is_wrong_is_not_taken(attend: Callable[..., torch.Tensor], spec, where: str) -> None:
    verdict = check(backend(attend), spec, torch.float32, CPU)
    assert not verdict.right
    assert not verdict.taken
    assert verdict.problem.startswith(f"differs from the reference at {where}: ")
    assert verdict.kernel == 0, "what is wrong need not be timed"


def test_column_sums_alone_are_looked_at() -> None:
    def doubled(queries, view, spec, sums) -> None:
        reference.column_sums(queries, view, spec, sums)
        sums.mul_(2)

    problem = check(backend(column_sums=doubled), SUMMED, torch.float32, CPU).problem
    assert problem.startswith("differs from the reference at column sums of several new tokens")


def test_what_does_not_launch_is_a_problem_on_one_line() -> None:
    verdict = check(backend(toys.does_not_launch), SPEC, torch.float32, CPU)
    assert verdict.problem == "fails at one new token (RuntimeError: out of resource: shared memory)"


def test_what_leaves_the_device_broken_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(checking, "_wait", dead)
    with pytest.raises(KvcompileError, match=r"cpu must go on working .* shared memory\. Fix: start the process again"):
        check(backend(toys.does_not_launch), SPEC, torch.float32, CPU)


def test_what_is_slow_is_not_taken() -> None:
    verdict = check(backend(toys.slow), SPEC, torch.float32, CPU)
    assert verdict.right
    assert verdict.kernel > verdict.library > 0
    assert not verdict.taken
    assert verdict.reason.startswith("not faster than the library here, ")


@pytest.mark.usefixtures("slow_library")
def test_the_library_is_timed_too() -> None:
    verdict = check(backend(reference.attend), SPEC, torch.float32, CPU)
    assert verdict.library > 0.01 > verdict.kernel
    assert verdict.taken


def test_sums_are_part_of_what_the_library_needs() -> None:
    """By the same numbers as the reference, where nothing is capped or hidden."""
    sample = checking.draw(SUMMED, torch.float32, checking.Shape(40), CPU)
    wanted, got = (torch.zeros(4, 40), torch.zeros(4, 40))
    reference.attend(sample.queries, sample.view, SUMMED, wanted)
    checking._sums_by_torch(sample.queries, sample.view, SUMMED, got)
    torch.testing.assert_close(got, wanted)
    assert sdpa.supports(replace(SUMMED, scores=False), torch.float32)


def test_no_random_state_and_no_gradient_is_touched() -> None:
    state = torch.get_rng_state()
    check(backend(), SPEC, torch.float32, CPU)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(build.available() is not None, reason="no compiler")
@pytest.mark.parametrize("scores", [False, True])
def test_generated_kernels_are_right(scores: bool) -> None:
    """Codes of two kinds and their residual, by the kernels that this CPU runs."""
    codes = Part("ragged", Codec("int4", "channel", 32), Codec("int4", "token", 32))
    spec = replace(SPEC, parts=(codes, *plain("ragged", "float32")), head_dim=32, value_dim=32, scores=scores)
    verdict = check(CPP, spec, torch.float32, CPU)
    assert verdict.right, verdict.problem
