"""Both halves of a decoder layer, called: weights are looked at once, what changes from step to step at every call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.cpp import build
from kvcompile.kernels.cpp.layer.source import TYPES, AfterSpec, BeforeSpec
from kvcompile.kernels.layers import AfterAttention, BeforeAttention, LayerKernels, Linear, Norm
from kvcompile.kernels.names import WEIGHTS
from kvcompile.kernels.pointers import address
from kvcompile.kernels.reference.packed import BLOCK, GROUP, Packed, require_packable

POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64
KEYS = 3  # parts that a call has room for: queries, keys, values


class CLinear(ctypes.Structure):
    """`Linear` of `rows.h`."""

    _fields_ = (("w", POINTER), ("bias", POINTER), ("N", SIZE), ("scales", POINTER), ("lows", POINTER))


class _Norm(ctypes.Structure):
    _fields_ = (("weight", POINTER), ("bias", POINTER), ("eps", ctypes.c_double))


class _Part(ctypes.Structure):
    _fields_ = (("linear", CLinear), ("norm", _Norm), ("normed", SIZE), ("turned", SIZE))


class _Before(ctypes.Structure):
    _fields_ = (("K", SIZE), ("head", SIZE), ("parts", SIZE), ("norm", _Norm), ("part", _Part * KEYS))


class _Results(ctypes.Structure):
    _fields_ = (("turned", POINTER * KEYS), ("plain", POINTER * KEYS))


class _After(ctypes.Structure):
    _fields_ = (
        *((name, SIZE) for name in ("K", "inner", "attended")),
        ("factor", ctypes.c_double),
        *((name, CLinear) for name in ("output", "gate", "up", "down")),
        *((name, _Norm) for name in ("output_norm", "norm", "down_norm")),
    )


def address_of(name: str, linear: Linear | None, inner: int, features: int = 0) -> CLinear:
    """Where a linear layer lies. features: what it must have (0: any). Raises KvcompileError where it is another."""
    if linear is None:
        return CLinear()
    weight, what = linear.weight, f"the weight of {name}"
    rows, dtype = features or weight.shape[0], weight.dtype
    bias = None if linear.bias is None else address(f"the bias of {name}", linear.bias, dtype, (rows,))
    if not isinstance(weight, Packed):
        return CLinear(address(what, weight, dtype, (rows, inner)), bias, rows)
    require_packable(name, (rows, inner))
    blocks, groups = -(-rows // BLOCK), inner // GROUP
    codes = address(what, weight.codes, torch.uint8, (blocks, groups, GROUP * BLOCK * WEIGHTS[weight.format] // 8))
    scales, lows = (
        None if x is None else address(f"scales of {name}", x, torch.int16, (blocks, groups, BLOCK))
        for x in (weight.scales, weight.lows)
    )
    return CLinear(codes, bias, rows, scales, lows)


def _norm(name: str, norm: Norm | None, width: int, dtype: torch.dtype) -> _Norm:
    if norm is None:
        return _Norm()
    weight, bias = (
        None if x is None else address(f"{which} of {name}", x, dtype, (width,))
        for which, x in (("the weight", norm.weight), ("the bias", norm.bias))
    )
    return _Norm(weight, bias, norm.eps)


def _function(text: str, name: str, arguments: list[Any]) -> Callable[..., None]:
    function = getattr(build.load(text, name.replace("_", "-")), name)
    function.argtypes, function.restype = arguments, None
    return function  # type: ignore[no-any-return]


class Before:
    """The kernel before the attention of one layer. `plain`: which parts are also wanted before rotation."""

    def __init__(self, layer: BeforeAttention, plain: tuple[bool, ...]) -> None:
        first = layer.parts[0].linear.weight
        self.layer, self.dtype, self.inner = layer, first.dtype, first.shape[1]
        self.heads = [part.linear.weight.shape[0] // layer.head_dim for part in layer.parts]
        self.wanted = [*(True for _ in layer.parts), *plain]
        parts = (_Part * KEYS)()
        for place, part in enumerate(layer.parts):
            linear = address_of("a projection", part.linear, self.inner, self.heads[place] * layer.head_dim)
            norm = _norm("a head norm", part.norm, layer.head_dim, self.dtype)
            parts[place] = _Part(linear, norm, part.norm is not None, part.turned)
        norm = _norm("a norm", layer.norm, self.inner, self.dtype)
        self.fields = _Before(self.inner, layer.head_dim, len(self.heads), norm, parts)
        self.turns = any(part.turned for part in layer.parts)
        arguments = [POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, POINTER, SIZE, ctypes.c_int]
        self.run = _function(BeforeSpec.of(layer).text(), "before_attention", arguments)

    def __call__(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of each part what attention reads, then what it is before rotation, `[B, H, 1, D]`, None if not wanted."""
        batch, head_dim = x.shape[0], self.layer.head_dim
        states = address("states", x, self.dtype, (batch, 1, self.inner))
        where, width, apart = (0, 0), 0, 0
        if self.turns and cos is not None and sin is not None:
            rows, _, width = cos.shape
            shape, apart = (batch if rows > 1 else 1, 1, width), width if rows > 1 else 0
            where = address("cos", cos, torch.float32, shape), address("sin", sin, torch.float32, shape)
        count = len(self.heads)
        results: list[Tensor | None] = [
            x.new_empty((batch, self.heads[i % count], 1, head_dim)) if wanted else None
            for i, wanted in enumerate(self.wanted)
        ]
        at = [None if result is None else result.data_ptr() for result in results]
        to = _Results((POINTER * KEYS)(*at[:count]), (POINTER * KEYS)(*at[count:]))
        fields = ctypes.byref(self.fields)
        self.run(fields, states, *where, width, apart, ctypes.byref(to), batch, torch.get_num_threads())
        return tuple(results)


class After:
    """The kernel behind the attention of one layer."""

    def __init__(self, layer: AfterAttention) -> None:
        (hidden, attended), inner = layer.output.weight.shape, layer.up.weight.shape[0]
        self.layer, self.dtype, self.hidden, self.attended = layer, layer.output.weight.dtype, hidden, attended
        self.fields = _After(
            hidden,
            inner,
            attended,
            layer.factor,
            address_of("the output projection", layer.output, attended),
            address_of("the gate", layer.gate, hidden, inner),
            address_of("the MLP", layer.up, hidden),
            address_of("the MLP's output", layer.down, inner, hidden),
            _norm("the norm of the output", layer.output_norm, hidden, self.dtype),
            _norm("a norm", layer.norm, hidden, self.dtype),
            _norm("the norm of the MLP's output", layer.down_norm, hidden, self.dtype),
        )
        arguments = [POINTER, POINTER, POINTER, POINTER, SIZE, ctypes.c_int]
        self.run = _function(AfterSpec.of(layer).text(), "after_attention", arguments)

    def __call__(self, attended: Tensor, x: Tensor) -> Tensor:
        """The states that enter the next layer, `[B, 1, K]`."""
        batch, y = x.shape[0], torch.empty_like(x)
        read = address("attended values", attended, self.dtype, (batch, 1, self.attended))
        states = address("states", x, self.dtype, (batch, 1, self.hidden))
        self.run(ctypes.byref(self.fields), read, states, y.data_ptr(), batch, torch.get_num_threads())
        return y


def refuses(dtype: str) -> str | None:
    """Why there are no such kernels for weights of a dtype here; None where there are."""
    if dtype not in TYPES:
        return f"no kernel for weights in {dtype}"
    if torch.get_num_threads() > 1 and build.toolchain().openmp is None:
        return f"kernels run on one thread here ({build.toolchain().note})"
    return None


LAYERS = LayerKernels(refuses, Before, After)
