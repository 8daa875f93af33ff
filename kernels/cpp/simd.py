"""The vectors that all generated C++ shares, to be put in front of a kernel: `simd.h` and `codes.h` beside this."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def prelude() -> str:
    """Types (`bf16`, `fp16`, `e4m3`), the vector `F` of 16 floats, loads, stores, sums, `exp2_negative`, `tanh`.

    And `C`, 32 whole numbers of 16 bits: fields of stored codes, and their products.
    """
    here = Path(__file__)
    return "".join(here.with_name(name).read_text("utf-8") for name in ("simd.h", "codes.h"))
