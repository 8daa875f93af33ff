"""The linear layers of a decode step in C++: W read once at the speed of memory, for the few rows of one token."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from kvcompile.kernels.cpp import build, simd

MOST_ROWS = 8
POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
# x [m, K], W [N, K], bias [N] or None, y [m, N], m <= MOST_ROWS, K, N, threads; all contiguous, of one dtype
Kernel = Callable[[int, int, "int | None", int, int, int, int, int], None]


def source(dtype: torch.dtype, rows: Sequence[int] = range(1, MOST_ROWS + 1)) -> str:
    """The C++ text for one dtype and these numbers of rows, vectors included."""
    name = TYPES[dtype]
    products, body = (Path(__file__).with_name(f"{part}.h").read_text("utf-8") for part in ("products", "linear"))
    cases = "".join(f"    case {m}: return product<{m}>(x, w, bias, y, K, N, threads);\n" for m in rows)
    return (
        f"{simd.prelude()}\ntypedef {name} T;\n#define T_IS_{name.upper()}\n\n{products}\n{body}\n"
        'extern "C" void linear(const T* x, const T* w, const T* bias, T* y,\n'
        "                       int64_t m, int64_t K, int64_t N, int threads) {\n"
        f"  switch (m) {{\n{cases}  }}\n}}\n"
    )


def load(text: str, flags: tuple[str, ...] = ()) -> Kernel:
    """The compiled product. Raises KvcompileError where nothing can be compiled."""
    function = build.load(text, "linear", flags)["linear"]
    function.argtypes = [POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, ctypes.c_int]
    function.restype = None
    kernel: Kernel = function
    return kernel


@lru_cache(maxsize=len(TYPES))
def kernel(dtype: torch.dtype) -> Kernel:
    """The product of one dtype, compiled when it is first asked for."""
    return load(source(dtype))
