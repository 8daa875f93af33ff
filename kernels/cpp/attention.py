"""The route `cpp`: attention by generated C++, one kernel per spec and dtype of the queries, compiled on first use.

One new token a sequence runs a decode kernel over any layout and number format. What C++ is not meant for goes to
the library route, and `describe` says so: prefill over plain floats, float64, and whatever autograd must follow.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from struct import Struct

import torch
from kvcompile.kernels import sdpa
from kvcompile.kernels.cpp import build, simd, step
from kvcompile.kernels.cpp.stored import ELEMENTS
from kvcompile.kernels.layout import Queries, View, parts
from kvcompile.kernels.spec import KernelSpec
from torch import Tensor

QUERY_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
Kernel = Callable[[Queries, View, "Tensor | None"], Tensor]

_recent: dict[tuple[int, torch.dtype, bool], tuple[KernelSpec, Kernel]] = {}
_kernels: dict[tuple[KernelSpec, torch.dtype, bool], Kernel] = {}
REMEMBERED = 4096


def attend(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    """Same contract as `reference.attend`, in the dtype of the queries, computed in float32.

    Raises KvcompileError where no compiler works.
    """
    states = queries.states
    many = states.shape[2] > 1
    if states.requires_grad and torch.is_grad_enabled():
        return sdpa.attend(queries, view, spec, sums)
    # specs are few and live long: to hash one takes longer than to call the kernel
    found = _recent.get((id(spec), states.dtype, many))
    if found is None or found[0] is not spec:
        found = spec, _kernel(spec, states.dtype, many)
        if len(_recent) >= REMEMBERED:
            _recent.clear()
        _recent[id(spec), states.dtype, many] = found
    return found[1](queries, view, sums)


def source(spec: KernelSpec, dtype: torch.dtype) -> str:
    """The generated text of the decode kernel, without the vectors that all kernels share."""
    return step.source(spec, QUERY_TYPES[dtype])


def by_library(spec: KernelSpec, dtype: torch.dtype, many: bool) -> str:
    """Why this goes to the library route, or an empty text."""
    kinds = {codec.kind for part in spec.parts for codec in (part.key, part.value)}
    if dtype not in QUERY_TYPES or not kinds <= set(ELEMENTS):
        return "float64 is not generated"
    if many:
        return "a prefill is a job for SDPA"
    return ""


def _kernel(spec: KernelSpec, dtype: torch.dtype, many: bool) -> Kernel:
    key = (spec, dtype, many)
    if key not in _kernels:
        if by_library(spec, dtype, many):
            _kernels[key] = lambda queries, view, sums: sdpa.attend(queries, view, spec, sums)
        else:
            _kernels[key] = Step(spec, dtype)
    return _kernels[key]


def _sums(sums: Tensor | None, spec: KernelSpec) -> tuple[int, int]:
    if sums is None:
        raise ValueError(f"{spec.name} adds the attention that entries received to `sums`, and got none")
    return sums.data_ptr(), sums.stride(0)


class Step:
    """A compiled decode kernel and what it is called with."""

    def __init__(self, spec: KernelSpec, dtype: torch.dtype) -> None:
        library = build.load(simd.prelude() + source(spec, dtype), "attend-step")
        self.run = library.attend_step
        self.run.argtypes, self.run.restype = (ctypes.c_char_p,), None
        self.spec = spec
        self.places = step.arguments(spec)
        self.single = self.places[0] if len(self.places) == 1 else None

    def __call__(self, queries: Queries, view: View, sums: Tensor | None = None) -> Tensor:
        """Attention `[B, H_q, 1, D_v]` of one new token of each sequence."""
        spec, states, valid = self.spec, queries.states, queries.valid
        batch, heads, _, _ = states.shape
        sequence, head, _, channel = states.stride()
        if channel != 1:
            states = states.contiguous()
            sequence, head = states.stride()[:2]
        out = torch.empty(batch, heads, 1, spec.value_dim, dtype=states.dtype)
        groups = heads // spec.group
        numbers = [states.data_ptr(), sequence, head, out.data_ptr(), batch * groups, groups]
        numbers.append(valid.data_ptr() if valid is not None else 0)
        numbers.append(torch.get_num_threads())
        if spec.sliding_window:
            numbers.append(queries.positions.data_ptr())
        if spec.scores:
            numbers += _sums(sums, spec)
        if self.single is not None:
            numbers += self.single.pack(view)
        else:
            for place, segment in zip(self.places, parts(view), strict=True):
                numbers += place.pack(segment)
        self.run(Struct(f"{len(numbers)}q").pack(*numbers))
        return out
