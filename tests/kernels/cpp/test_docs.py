"""docs/kernels-cpp.md shows what the generator writes, all of it."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from kvcompile.kernels.cpp import simd

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "kernels-cpp.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{re.escape(language)}\n(.*?)\n```", PAGE, re.S)


def test_the_annotated_kernel_is_what_the_page_says_prints_it() -> None:
    (snippet,) = blocks("python")
    printed = StringIO()
    with redirect_stdout(printed):
        exec(snippet, {})
    shown = [line for block in blocks("cpp") for line in block.splitlines() if line]
    assert len(shown) > 400
    assert shown == [line for line in printed.getvalue().splitlines() if line]


def test_what_is_quoted_beside_it_is_there() -> None:
    (vectors,) = blocks("c++")
    assert vectors in simd.prelude()
    (oracle,) = blocks("py")
    reference = [line.strip() for line in (ROOT / "kernels/reference/attention.py").read_text("utf-8").splitlines()]
    assert all(line in reference for line in oracle.splitlines())
