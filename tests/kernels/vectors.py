"""Small C++ functions over the vectors of generated kernels, built for every path this CPU can run."""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from kvcompile.kernels.cpp import build, simd

X86 = platform.machine() in ("x86_64", "AMD64")
PATHS = {"native": (), **({"avx2": ("-march=haswell",), "portable": ("-march=x86-64",)} if X86 else {})}
# GCC 12 finds uninitialised values in its own headers
STRICT = ("-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized")


def built(path: str, body: str, name: str) -> ctypes.CDLL:
    flags = PATHS[path]
    if flags and "AVX2" not in build.toolchain().simd and "AVX-512" not in build.toolchain().simd:
        pytest.skip("this CPU has no AVX2")
    return build.load(simd.prelude() + body, name, (*flags, *STRICT))


def run(
    library: ctypes.CDLL, name: str, x: Tensor, size: int, out: torch.dtype = torch.float32, count: int = 0
) -> Tensor:
    """What the function `name` makes of `x` in `size` places that held sevens."""
    y = torch.full((size,), 7.0).to(out)
    getattr(library, name)(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), count)
    return y


@contextmanager
def unreadable() -> Iterator[int]:
    """An address whose bytes cannot be read, behind a page of zeros that can."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + page
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(end, page, 0) == 0
    try:
        yield end
    finally:
        assert protect(end, page, 3) == 0
