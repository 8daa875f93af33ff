"""Rows that choose together take the same groups, by the sum of what they score."""

from __future__ import annotations

import pytest
import torch

from kvcompile.kernels.choose import GroupTable, choose, scores

ROWS, GROUP, DIM, BLOCKS, SIZE, FIRST = 6, 2, 8, 5, 4, 3


def table() -> GroupTable:
    """Five groups of four entries in each row, after three sinks."""
    torch.manual_seed(0)
    starts = FIRST + SIZE * torch.arange(BLOCKS, dtype=torch.int32).expand(ROWS, -1)
    sizes = torch.full((ROWS, BLOCKS), SIZE, dtype=torch.int32)
    ends = [FIRST + SIZE * BLOCKS] * ROWS
    return GroupTable(torch.randn(ROWS, BLOCKS, DIM), starts, sizes, ends, FIRST)


@pytest.mark.parametrize("agree", ["mean", "max"])
def test_rows_that_choose_together_take_the_best_groups_of_all(agree: str) -> None:
    groups, lengths = table(), [FIRST + SIZE * BLOCKS + 2] * ROWS
    queries = torch.randn(ROWS, GROUP, DIM)
    together = list(choose(queries, groups, [2 * SIZE] * ROWS, lengths, agree, together=3))
    for sequence in range(2):
        rows = range(3 * sequence, 3 * sequence + 3)
        total = torch.zeros(BLOCKS)
        for r in rows:
            of_query = queries[r] @ groups.representatives[r].T
            total += of_query.mean(0) if agree == "mean" else of_query.max(0).values
        best = total.topk(2).indices.sort().values.tolist()
        blocks = [FIRST + SIZE * g + i for g in best for i in range(SIZE)]
        expected = [*range(FIRST), *blocks, lengths[0] - 2, lengths[0] - 1]
        assert [together[r].tolist() for r in rows] == [expected] * 3


def test_a_row_alone_chooses_as_before() -> None:
    groups, queries = table(), torch.randn(ROWS, GROUP, DIM)
    assert torch.equal(scores(queries, groups, "mean"), scores(queries, groups, "mean", together=1))
    assert not torch.equal(scores(queries, groups, "mean"), scores(queries, groups, "mean", together=3))
