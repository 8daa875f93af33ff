"""Linear layers with weights in few bits, in C++: products for the rows of a decode step, and the weights as floats."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.cpp import build
from kvcompile.kernels.cpp.layer.run import POINTER, SIZE, address_of
from kvcompile.kernels.cpp.layer.source import PRODUCTS, linear_text
from kvcompile.kernels.layers import Linear
from kvcompile.kernels.pointers import address, opaque
from kvcompile.kernels.reference.packed import Packed


@cache
def _library(dtype: str, weights: str) -> tuple[Any, Any]:
    """Product and floats of one dtype and format, compiled when they are first asked for."""
    library = build.load(linear_text(dtype, weights), "few-bits")
    product, floats = library["few_bits_linear"], library["few_bits_floats"]
    product.argtypes = [POINTER, POINTER, POINTER, SIZE, SIZE, ctypes.c_int]
    floats.argtypes = [POINTER, POINTER, SIZE, ctypes.c_int]
    product.restype = floats.restype = None
    return product, floats


def supports(dtype: torch.dtype) -> bool:
    """Whether there are kernels for x and y in a dtype."""
    return str(dtype).removeprefix("torch.") in PRODUCTS


def prepare(dtype: torch.dtype, format: str) -> None:
    """Compile both kernels. Raises KvcompileError where nothing can be compiled."""
    _library(str(dtype).removeprefix("torch."), format)


@opaque
def product(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """y [..., N] = x [..., K] W^T + b for up to 32 rows in the dtype of the weights' products.

    Raises KvcompileError where a tensor is not what the kernel reads.
    """
    x = x.contiguous()
    features, inner = weight.shape
    rows = x.numel() // inner
    y = x.new_empty((*x.shape[:-1], features))
    at = address("rows", x.view(rows, inner), weight.dtype, (rows, inner))
    linear = Linear(weight, bias)
    run, _ = _library(*linear.kind)
    fields = address_of("a linear layer", linear, inner)
    run(ctypes.byref(fields), at, y.data_ptr(), rows, inner, torch.get_num_threads())
    return y


@opaque
def floats(weight: Packed) -> Tensor:
    """The weights `[N, K]` in the dtype of their products. Raises KvcompileError for what is not as its format says."""
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.codes.device)
    linear = Linear(weight, None)
    _, run = _library(*linear.kind)
    fields = address_of("a linear layer", linear, weight.shape[1])
    run(ctypes.byref(fields), result.data_ptr(), weight.shape[1], torch.get_num_threads())
    return result
