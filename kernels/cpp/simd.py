"""The vectors that all generated C++ shares, to be put in front of a kernel: `simd.h` and `codes.h` beside this."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

ALSO = "#include <memory>\n#include <vector>\n"  # what kernels include after the vectors


@lru_cache(maxsize=1)
def prelude() -> str:
    """Types (`bf16`, `fp16`, `e4m3`), the vector `F` of 16 floats, loads, stores, sums, `exp2_negative`, `tanh`.

    And `C`, 32 whole numbers of 16 bits: fields of stored codes, and their products. All of it behind a guard, so that
    a compiler that has it already from `header` skips it.
    """
    here = Path(__file__)
    text = "".join(here.with_name(name).read_text("utf-8") for name in ("simd.h", "codes.h"))
    return f"#ifndef KV_VECTORS\n#define KV_VECTORS\n{text}#endif  // KV_VECTORS\n"


def header() -> str:
    """What a compiler need parse only once for all kernels: the vectors and the standard headers."""
    return prelude() + ALSO
