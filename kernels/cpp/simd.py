"""The vectors that all generated C++ shares, as text to put in front of a kernel: see `simd.h` beside this file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def prelude() -> str:
    """Types (`bf16`, `fp16`, `e4m3`), the vector `F` of 16 floats, loads, stores, sums, `exp2_negative`, `tanh`."""
    return Path(__file__).with_name("simd.h").read_text("utf-8")
