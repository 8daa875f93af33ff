"""What a recall says of a row ahead: how many entries are in groups, how many groups those are, how many are read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvcompile.plan.recall import Grouping, Recall
from kvcompile.plan.selection import Budget
from kvcompile.plan.storage import PLAIN, Codec, Storage


@dataclass(frozen=True)
class Parts(Grouping):
    """So many groups as fives begin: their number depends on how many entries are divided together."""

    size: int = 1

    @property
    def block(self) -> int:
        return self.size

    def count(self, entries: int, unit: int) -> int:
        return -(-entries // 5)


def recall(size: int, sinks: int, recent: int) -> Recall:
    return Recall("test", Parts(size), Budget(16), sinks=sinks, recent=recent)


KIVI = Storage(key=Codec("int4", "channel", 8), residual=10)


@pytest.mark.parametrize("storage", [PLAIN, KIVI], ids=["plain", "kivi"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 64, 1000])
@pytest.mark.parametrize(("size", "sinks", "recent"), [(1, 0, 0), (4, 2, 5), (6, 16, 32), (1, 3, 0)])
def test_groups_are_counted_as_chunks_make_them(
    size: int, sinks: int, recent: int, chunk: int, storage: Storage
) -> None:
    r = recall(size, sinks, recent)
    for length in (0, 1, 5, 20, 63, 64, 65, 200, 333):
        covered = groups = 0
        for end in [*range(chunk, length, chunk), length]:
            new = r.groupable(end, covered, storage.block, r.newest(storage))
            covered, groups = covered + new, groups + (r.grouping.count(new, storage.block) if new else 0)
        assert r.grouped(length, chunk, storage) == (covered, groups)
        assert r.first(storage.block) + covered + r.newest(storage) <= length or not covered


def test_whole_units_are_read_and_never_more_than_there_are() -> None:
    r = recall(1, 0, 0)
    assert [r.tokens(1000, covered, 1) for covered in (0, 5, 16, 100)] == [0, 5, 16, 16]
    assert [r.tokens(1000, covered, 5) for covered in (0, 5, 15, 100)] == [0, 5, 15, 15]
    assert r.tokens(1000, 64, 32) == 32, "one unit at least"
