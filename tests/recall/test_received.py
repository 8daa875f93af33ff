"""What entries have received follows them: as they come, go into groups, leave them, are dropped, change rows."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.recall import Entries, Recall
from kvcompile.plan.selection import Budget
from kvcompile.plan.storage import PLAIN
from kvcompile.policies.infllm import Blocks
from kvcompile.recall.index import Index
from kvcompile.runtime.cache import KVCache

SINKS, RECENT, BLOCK = 2, 3, 4


def index(rows: int) -> Index:
    """An empty one."""
    return Index(Recall("test", Blocks(BLOCK, 2), Budget(8), SINKS, RECENT, every=1), PLAIN, rows)


def expected(received: list[list[float]], covered: list[int]) -> list[list[float]]:
    """Of each row, what the entries behind its groups have received."""
    return [row[SINKS + n :] for row, n in zip(received, covered, strict=True)]


def actual(of: Index) -> list[list[float]]:
    """The same as it is held."""
    assert of.received is not None
    return [row[:n].tolist() for row, n in zip(of.received.sums, of.received.counts, strict=True)]


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.sampled_from(["all", "some", "group", "dissolve", "keep", "select"])),
        max_size=12,
    )
)
@settings(max_examples=100, deadline=None)
def test_sums_follow_their_entries(events: list[tuple[int, str]]) -> None:
    """Rows of different lengths, seen whole or in part; `received` is kept by hand, an entry at a time."""
    rows, made = 2, torch.Generator().manual_seed(0)
    of, received = index(rows), [[0.0], [0.0] * 3]
    of.receive(torch.zeros(rows, 3), [1, 3], [1, 3])
    for count, what in events:
        for row in received:
            row += [0.0] * count
        lengths = [len(row) for row in received]
        if what in ("all", "some"):
            behind = [max(0, n - SINKS - c) for n, c in zip(lengths, of.covered, strict=True)]
            ends = lengths if what == "all" else [n + 1 for n in behind]  # one of what was chosen, and those behind
            columns = torch.randint(1, 9, (rows, max(ends)), generator=made).float()
            of.receive(columns, ends, lengths)
            for row, column, end, n in zip(received, columns.tolist(), ends, behind, strict=True):
                for j in range(n):
                    row[len(row) - 1 - j] += column[end - 1 - j]
        elif what == "group":
            of.receive(torch.zeros(rows, max(lengths)), lengths, lengths)
            for n, due in of.due(lengths, 1).items():
                seen = of.received.oldest(due, n)  # type: ignore[union-attr]
                starts = [SINKS + of.covered[r] for r in due]
                assert seen.tolist() == [received[r][a : a + n] for r, a in zip(due, starts, strict=True)]
                groups = Blocks(BLOCK, 2).divide(entries(n, seen))
                of._add(due, starts, n, groups)
        elif what == "dissolve":
            of.receive(torch.zeros(rows, max(lengths)), lengths, lengths)
            received = [
                [*row[:SINKS], *[0.0] * n, *row[SINKS + n :]] for row, n in zip(received, of.covered, strict=True)
            ]
            of.dissolve()
        elif what == "keep":
            of.receive(torch.zeros(rows, max(lengths)), lengths, lengths)
            kept = [[j for j in range(n) if j < SINKS or (j + r) % 3] for r, n in enumerate(lengths)]
            received = [
                [*row[:SINKS], *[0.0] * n, *row[SINKS + n :]] for row, n in zip(received, of.covered, strict=True)
            ]
            received = [[row[j] for j in at] for row, at in zip(received, kept, strict=True)]
            of.keep([torch.tensor(at) for at in kept])
        else:
            of = copy.deepcopy(of)
            of.select(torch.tensor([1, 0]), heads=1)
            received.reverse()
        lengths = [len(row) for row in received]
        of.receive(torch.zeros(rows, max(lengths)), lengths, lengths)
        assert actual(of) == expected(received, of.covered)
        assert of.nbytes() == of.table_bytes() + 4 * sum(map(len, actual(of)))


def entries(count: int, received: Tensor) -> Entries:
    """Entries that received this, with keys of no interest."""
    return Entries(torch.randn(len(received), count, 3), received=received)


def test_a_copy_is_another() -> None:
    of = index(1)
    of.receive(torch.ones(1, 5), [5], [5])
    twin = copy.deepcopy(of)
    twin.receive(torch.ones(1, 5), [5], [5])
    assert actual(of) == [[1.0] * 3]
    assert actual(twin) == [[2.0] * 3]


def test_tokens_that_were_received_from_cannot_be_taken_back() -> None:
    """What they gave is in the sums."""
    recall = Recall("test", Blocks(BLOCK, 2), Budget(8), SINKS, RECENT)
    cache = KVCache(Plan("llama", "float32", (LayerPlan(0, 2, 1, 8, 0, 1.0, recall=recall),)))
    step = cache.begin(torch.zeros(1, 5, dtype=torch.long), None)
    layer = cache.layers[0]
    layer.append(*torch.randn(2, 1, 1, 5, 8), step.positions, step.valid, 8)
    layer.attend(torch.randn(1, 2, 5, 8), step, 0)
    assert cache.croppable == 0


@pytest.mark.parametrize("count", [1, 3])
def test_every_query_gives_one(count: int) -> None:
    """Of a row without sinks, all that was received is the number of queries, of all query heads."""
    recall = Recall("test", Blocks(BLOCK, 2), Budget(8), 0, 100)
    cache = KVCache(Plan("llama", "float32", (LayerPlan(0, 4, 2, 8, 0, 1.0, recall=recall),)))
    total = 0
    for n in (count, 1, 2):
        step = cache.begin(torch.zeros(1, n, dtype=torch.long), None)
        cache.layers[0].append(*torch.randn(2, 1, 2, n, 8), step.positions, step.valid, 8)
        cache.layers[0].attend(torch.randn(1, 4, n, 8), step, 0)
        total += n
    received = cache.layers[0].index.received
    torch.testing.assert_close(received.sums.sum(1), torch.full((2,), 2.0 * total))
