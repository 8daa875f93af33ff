"""Compaction in C++ moves the very bytes that the torch reference moves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from moves import FEW, case, check

from kvcompile.kernels.compact import Arrays
from kvcompile.kernels.cpp import build
from kvcompile.kernels.cpp import compact as generated

pytestmark = pytest.mark.skipif(build.available() is not None, reason="no C++ compiler here")


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(generated._kernel, {case(name, way, 0).spec for name, way in FEW}))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("name", "way"), FEW, ids=lambda x: x if isinstance(x, str) else "-".join(filter(None, x)))
def test_every_layout_and_format(
    name: str, way: tuple[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated, "SMALL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for seed in range(12):
        check(generated.compact, case(name, way, seed))


@pytest.mark.parametrize("way", [("dense", "ragged"), ("paged", "")], ids="-".join)
def test_rows_of_many_pieces(way: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than what one thread takes at a time."""
    monkeypatch.setattr(generated, "SMALL", 0)
    for seed in range(3):
        check(generated.compact, case("int4", way, seed, longest=4 * generated.PIECE + 32))


def test_nothing_kept_moves_nothing() -> None:
    held = torch.randn(1, 2, 4, 64)
    target = torch.randn(0, 64)
    generated.compact(
        Arrays((held,)), Arrays((target,), starts=torch.zeros(2, dtype=torch.long)), torch.arange(0), [0, 0]
    )
