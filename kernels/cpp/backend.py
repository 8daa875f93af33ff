"""The backend `cpp`: attention by generated C++, one kernel per spec and dtype of the queries, compiled on first use.

One new token a sequence runs a step kernel, several run a chunk kernel, over any layout and number format; the last of
a prompt run one that computes column sums alone. A whole prompt at once over plain dense floats is left to SDPA.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cached_property
from struct import Struct
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels import reference, sdpa
from kvcompile.kernels.backend import Backend
from kvcompile.kernels.cpp import build, choose, compact, demote, encode, ghost, lower, simd
from kvcompile.kernels.cpp.emit import decode_kernel, prefill_kernel
from kvcompile.kernels.cpp.layer.run import LAYERS
from kvcompile.kernels.cpp.sources import QUERY_TYPES, CppSources, source, supports
from kvcompile.kernels.layout import DenseView, Queries, View, longest, parts
from kvcompile.kernels.pointers import address, opaque
from kvcompile.kernels.spec import KernelSpec
from kvcompile.plan.storage import Codec

Kernel = Callable[[Queries, View, "Tensor | None"], Tensor]

_recent: dict[tuple[int, torch.dtype, bool], tuple[KernelSpec, Kernel]] = {}
_kernels: dict[tuple[KernelSpec, torch.dtype, bool, bool], Kernel] = {}
_building: dict[tuple[KernelSpec, torch.dtype, bool, bool], threading.Lock] = {}
_lock = threading.Lock()
REMEMBERED = 4096


@opaque
def attend(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    """Same contract as `reference.attend`, in the dtype of the queries, computed in float32.

    No gradients pass. Raises KvcompileError where no compiler works, and for a spec that is not supported.
    """
    states = queries.states
    many = states.shape[2] > 1
    # specs are few and live long: to hash one takes longer than to call the kernel
    recent = _recent.get((id(spec), states.dtype, many))
    if recent is None or recent[0] is not spec:
        recent = spec, _kernel(spec, states.dtype, many)
        if len(_recent) >= REMEMBERED:
            _recent.clear()
        _recent[id(spec), states.dtype, many] = recent
    return recent[1](queries, view, sums)


@opaque
def column_sums(queries: Queries, view: View, spec: KernelSpec, sums: Tensor) -> None:
    """Add to `sums [R, longest row]` the attention that each entry receives from `queries`, the last of a prefill.

    Causal by true positions, like `attend`; the spec has `scores`, and values are not read. A block of 64 queries keeps
    its logits, so that each thread holds 64 floats an entry, whatever the number of heads and queries. Faster than the
    softmax in torch (`benchmarks/window_sums.py`).
    """
    _kernel(spec, queries.states.dtype, True, False)(queries, view, sums)


def ready(device: torch.device) -> None:
    """Raise KvcompileError where there is no CPU or no compiler."""
    if device.type != "cpu":
        raise KvcompileError("kernels=cpp runs on a CPU", f"a model on {device.type}", "set kernels=auto")
    build.toolchain()


def _plain(spec: KernelSpec, dtype: torch.dtype) -> bool:
    """Whether SDPA takes these rows as they lie, with its own causal mask."""
    own = Codec(QUERY_TYPES[dtype])
    alike = all(p.layout == "dense" and p.key == own and p.value == own for p in spec.parts)
    return alike and len(spec.parts) == 1 and not (spec.sliding_window or spec.softcap or spec.scores or spec.sink)


def _kernel(spec: KernelSpec, dtype: torch.dtype, many: bool, values: bool = True) -> Kernel:
    key = (spec, dtype, many, values)
    with _lock:
        lock = _building.setdefault(key, threading.Lock())
    with lock:
        if key not in _kernels:
            if not supports(spec, dtype):
                raise KvcompileError(
                    f"kernels=cpp has no kernel for {spec.name}", f"queries in {dtype}", "set kernels=auto"
                )
            _kernels[key] = (Chunk if values else Window)(spec, dtype) if many else Step(spec, dtype)
    return _kernels[key]


class _Compiled:
    """A kernel and what the parts of its view are called with."""

    function: ClassVar[str]
    many, values = True, True

    def __init__(self, spec: KernelSpec, dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype
        self.places = prefill_kernel.arguments(spec) if self.many else decode_kernel.arguments(spec)
        self.single = self.places[0] if len(self.places) == 1 else None

    @cached_property
    def run(self) -> Any:
        """The function, compiled when it is first called: a prompt that SDPA takes needs no compiler."""
        text = simd.prelude() + source(self.spec, self.dtype, self.many, self.values)
        function = getattr(build.load(text, self.function.replace("_", "-")), self.function)
        function.argtypes, function.restype = (ctypes.c_char_p,), None
        return function

    def call(self, numbers: list[int], batch: int, heads: int, view: View, sums: Tensor | None) -> None:
        """Run with the given fields, then those of the sums and of the parts, all of them 8 bytes.

        heads: KV heads. Raises KvcompileError where a tensor is not what the kernel reads or writes.
        """
        if self.spec.scores:
            if sums is None:
                raise ValueError(f"{self.spec.name} adds the attention that entries received to `sums`, and got none")
            room = (batch * heads, max(longest(view), sums.shape[1]))
            numbers += (address("sums", sums, torch.float32, room, (1,)), sums.stride(0))
        if self.single is not None:
            numbers += self.single.pack(view, batch, heads)
        else:
            for place, segment in zip(self.places, parts(view), strict=True):
                numbers += place.pack(segment, batch, heads)
        self.run(Struct(f"{len(numbers)}q").pack(*numbers))


class Step(_Compiled):
    """A decode kernel: one new token of each sequence."""

    function = "attend_step"
    many = False

    def __call__(self, queries: Queries, view: View, sums: Tensor | None = None) -> Tensor:
        """Attention `[B, H_q, 1, D_v]`."""
        spec, states, valid = self.spec, queries.states, queries.valid
        states = states if states.stride(3) == 1 else states.contiguous()
        batch, heads, _, _ = states.shape
        groups = heads // spec.group
        out = torch.empty(batch, heads, 1, spec.value_dim, dtype=self.dtype, device=states.device)
        numbers = [address("queries", states, self.dtype, (batch, groups * spec.group, 1, spec.head_dim), (1,))]
        numbers += [*states.stride()[:2], out.data_ptr(), batch * groups, groups, _marks(valid, batch, 1)]
        numbers.append(torch.get_num_threads())
        if spec.sliding_window:
            numbers.append(address("positions", queries.positions, torch.int64, (batch, 1)))
        numbers += _sinks(queries, spec, groups)
        self.call(numbers, batch, groups, view, sums)
        return out


class Chunk(_Compiled):
    """A kernel for several new tokens of each sequence."""

    function = "attend_chunk"

    def __init__(self, spec: KernelSpec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        self.plain = _plain(spec, dtype)

    def __call__(self, queries: Queries, view: View, sums: Tensor | None = None) -> Tensor:
        """Attention `[B, H_q, Q, D_v]`, laid out as `[B, Q, H_q, D_v]`, which is what follows it."""
        if (
            self.plain
            and queries.valid is None
            and isinstance(view, DenseView)
            and view.keys.shape[2] == queries.states.shape[2]
        ):
            return sdpa.attend(queries, view, self.spec)
        queries, spec = _laid_out(queries), self.spec
        batch, heads, count, _ = queries.states.shape
        make = torch.empty if queries.valid is None else torch.zeros
        out = make(batch, count, heads, spec.value_dim, dtype=self.dtype, device=queries.states.device).transpose(1, 2)
        numbers = [
            *_query_numbers(queries, spec, self.dtype),
            out.data_ptr(),
            *out.stride()[:3],
            *_new_tokens(queries, spec),
        ]
        self.call(numbers, batch, heads // spec.group, view, sums)
        return out


class Window(_Compiled):
    """Column sums alone, of several queries of each sequence."""

    function = "window_sums"
    values = False

    def __call__(self, queries: Queries, view: View, sums: Tensor | None = None) -> Tensor:
        """`sums`, to which what entries received was added. Raises ValueError where there is no such tensor."""
        queries = _laid_out(queries)
        batch, heads = queries.states.shape[:2]
        numbers = [*_query_numbers(queries, self.spec, self.dtype), *_new_tokens(queries, self.spec)]
        self.call(numbers, batch, heads // self.spec.group, view, sums)
        return sums  # type: ignore[return-value]


def _laid_out(queries: Queries) -> Queries:
    """Queries whose channels, positions and marks lie one after the other."""
    states, valid = queries.states, queries.valid
    return Queries(
        states if states.stride(3) == 1 else states.contiguous(),
        queries.positions.contiguous(),
        None if valid is None else valid.contiguous(),
        queries.sinks,
    )


def _query_numbers(queries: Queries, spec: KernelSpec, dtype: torch.dtype) -> tuple[int, ...]:
    """Where queries `[B, H_q, Q, D]` lie: the address, and the strides of all but the channels."""
    batch, heads, count, _ = queries.states.shape
    shape = (batch, heads // spec.group * spec.group, count, spec.head_dim)
    return (address("queries", queries.states, dtype, shape, (1,)), *queries.states.stride()[:3])


def _new_tokens(queries: Queries, spec: KernelSpec) -> list[int]:
    """What is said of the new tokens after where they lie, up to the number of threads."""
    batch, heads, count, _ = queries.states.shape
    groups, at = heads // spec.group, queries.positions
    numbers = [batch * groups, groups, count, address("positions", at, torch.int64, (batch, count)), at.stride(0)]
    return [*numbers, _marks(queries.valid, batch, count), torch.get_num_threads(), *_sinks(queries, spec, groups)]


def _sinks(queries: Queries, spec: KernelSpec, heads: int) -> tuple[int, ...]:
    """Where the sink logits of the query heads over `heads` KV heads lie; nothing, of a spec without."""
    if not spec.sink:
        return ()
    sinks = reference.required(queries.sinks, "a learned sink")
    return (address("sinks", sinks, torch.float32, (heads * spec.group,)),)


def _marks(valid: Tensor | None, batch: int, count: int) -> int:
    """Where the marks of real tokens lie, 0 without any."""
    return 0 if valid is None else address("marks of real tokens", valid, torch.bool, (batch, count))


CPP = Backend(
    "cpp",
    attend,
    ready=ready,
    supports=supports,
    library_prompts=True,
    column_sums=column_sums,
    encode=encode.encode,
    compact=compact.compact,
    choose=choose.choose,
    demote=demote.demote,
    ghost=ghost.ghost_scores,
    linear=lower.lower,
    layers=LAYERS,
    sources=CppSources(),
)
