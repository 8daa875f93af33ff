"""One kernel run on small random rows: compared with the float64 reference, then timed beside the library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError, first_line
from kvcompile.kernels import reference, sdpa
from kvcompile.kernels.backend import Backend
from kvcompile.kernels.layout import Queries, View, longest, parts
from kvcompile.kernels.selfcheck.rows import Sample, Shape, draw
from kvcompile.kernels.selfcheck.verdict import Verdict
from kvcompile.kernels.spec import KernelSpec

# relative RMS: sums in another order, and weights in 8 bits where products are of integers; weights rounded to 16 bits
TOLERANCE = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = {  # short rows, rows that several programs share, several new tokens
    "one new token": Shape(37),
    "one new token, a long row": Shape(330, batch=1, heads=1),
    "several new tokens": Shape(61, new=5, padded=True),
}
TIMED, TIMED_ON_CPU = Shape(4096, batch=1, heads=8), Shape(256, batch=1, heads=2)
CALLS, ROUNDS, SECONDS = 5, 7, 1.0  # of a time; times; after which no further time is taken


def check(backend: Backend, spec: KernelSpec, dtype: torch.dtype, device: torch.device) -> Verdict:
    """Compare and time one kernel. What goes wrong in it is a problem of the verdict, not an error.

    Raises KvcompileError where the device does not work any more after that.
    """
    error = 0.0
    with torch.no_grad():
        for what, difference in differences(backend, spec, dtype, device):
            if isinstance(difference, Exception):
                _require_working(device, difference)
                problem = f"{type(difference).__name__}: {first_line(difference)}"
                return Verdict(f"fails at {what} ({problem})", error)
            error = max(error, difference)
            if not difference <= TOLERANCE[dtype]:
                problem = f"differs from the reference at {what}: {difference:.1e}, at most {TOLERANCE[dtype]:.0e}"
                return Verdict(problem, difference)
        kernel, library = times(backend, spec, dtype, device)
    return Verdict("", error, kernel, library)


def differences(
    backend: Backend, spec: KernelSpec, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, float | Exception]]:
    """By what was run: the relative RMS difference from the reference on the CPU, infinite for anything but numbers."""
    differs = all(part.layout != "dense" for part in spec.parts)  # dense rows have no padding
    for what, shape in SHAPES.items():
        each = replace(shape, padded=shape.padded and differs)
        here, there = (draw(spec, dtype, each, place) for place in (torch.device("cpu"), device))
        try:
            yield what, _attended(backend, spec, here, there)
            if spec.scores and backend.column_sums is not None and each.new > 1:
                yield f"column sums of {what}", _summed(backend, spec, here, there)
        except Exception as error:
            yield what, error


def _attended(backend: Backend, spec: KernelSpec, here: Sample, there: Sample) -> float:
    sums = _sums(spec, here.view)
    expected = reference.attend(here.queries, here.view, spec, sums)
    added = _sums(spec, there.view)
    out = backend.attend(there.queries, there.view, spec, added).cpu()
    if out.dtype != expected.dtype or out.shape != expected.shape or not bool(out.isfinite().all()):
        return float("inf")
    real = here.queries.valid
    rows = (out, expected) if real is None else (x.transpose(1, 2)[real] for x in (out, expected))
    differences = [_relative(*rows)]
    if sums is not None and added is not None:
        differences.append(_relative(added.cpu(), sums))
    return max(differences)


def _summed(backend: Backend, spec: KernelSpec, here: Sample, there: Sample) -> float:
    if backend.column_sums is None:
        return 0.0
    sums, added = _sums(spec, here.view), _sums(spec, there.view)
    if sums is None or added is None:
        return 0.0
    reference.column_sums(here.queries, here.view, spec, sums)
    backend.column_sums(there.queries, there.view, spec, added)
    return _relative(added.cpu(), sums)


def _sums(spec: KernelSpec, view: View) -> Tensor | None:
    """Where column sums are added, with something in it already; None for a spec without."""
    if not spec.scores:
        return None
    first = parts(view)[0]
    rows = first.keys.shape[:2].numel() if first.keys.dim() == 4 else len(first.lengths)  # type: ignore[union-attr]
    return torch.ones(rows, longest(view), dtype=torch.float32, device=first.keys.device)


def _relative(x: Tensor, expected: Tensor) -> float:
    """|x - expected| / |expected|, RMS; infinite where there is anything but numbers."""
    if not bool(x.isfinite().all()):
        return float("inf")
    error = (x.double() - expected.double()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt())


def times(backend: Backend, spec: KernelSpec, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Seconds of one new token's attention, by the kernel and by the library.

    Where the spec has scores, the library's time includes column sums in torch.
    """
    shape = TIMED_ON_CPU if device.type == "cpu" else TIMED
    sample = draw(spec, dtype, replace(shape, entries=-(-shape.entries // len(spec.parts))), device)
    view, queries, sums = sample.view, sample.queries, _sums(spec, sample.view)
    plain = replace(spec, scores=False)

    def library() -> None:
        sdpa.attend(queries, view, plain)
        if sums is not None:
            _sums_by_torch(queries, view, spec, sums)

    kernel, other = _in_turns([lambda: backend.attend(queries, view, spec, sums), library], device)
    return kernel, other


def _in_turns(runs: list[Callable[[], Any]], device: torch.device) -> list[float]:
    """The shortest time of each, compiled and warm, taken in turns: what others do at the same time only adds to it."""
    for run in runs:
        run()
    taken: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        for run, own in zip(runs, taken, strict=True):
            _wait(device)
            start = time.perf_counter()
            for _ in range(CALLS):
                run()
            _wait(device)
            own.append((time.perf_counter() - start) / CALLS)
        if time.perf_counter() - begin > SECONDS:
            break
    return [min(own) for own in taken]


def _sums_by_torch(queries: Queries, view: View, spec: KernelSpec, sums: Tensor) -> None:
    """Column sums of one new token as scores compute them, row by row."""
    batch, heads, _, dim = queries.states.shape
    for r in range(batch * heads // spec.group):
        b, h = divmod(r, heads // spec.group)
        keys, _, _ = reference.row(view, spec, b, h, queries.states.dtype)
        q = queries.states[b, h * spec.group : (h + 1) * spec.group].view(-1, dim)
        sums[r, : keys.shape[0]] += (q @ keys.T * spec.scale).float().softmax(-1).sum(0)


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _require_working(device: torch.device, error: Exception) -> None:
    """Raise KvcompileError where a kernel has left the device unusable for this process."""
    try:
        alive = int(torch.ones(1, dtype=torch.float32, device=device).sum()) == 1
        _wait(device)
    except Exception:
        alive = False
    if not alive:
        raise KvcompileError(
            f"{device} must go on working after the check of a kernel",
            first_line(error),
            "start the process again: that kernel is not taken any more; or set kernels=sdpa",
        ) from error
