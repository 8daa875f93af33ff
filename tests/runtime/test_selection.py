"""What a selection means is said once: the cache and an exported program keep the same entries, whatever the scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selecting import Above
from torch import Tensor
from torch._subclasses import FakeTensorMode

from kvcompile.plan.selection import LayerScores
from kvcompile.runtime.history import QueryHistory
from kvcompile.runtime.selection import (
    INFINITY,
    candidates,
    highest,
    highest_padded,
    in_moments,
    moments,
    protect,
    split,
)

HEADS = 2


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int | None, int, int]:
    """Scores of few different values and true positions with gaps `[H, n]`, tokens seen, window, sinks and recent."""
    tokens = draw(st.integers(1, 40))
    held = [sorted(draw(st.sets(st.integers(0, tokens - 1), min_size=1))) for _ in range(HEADS)]
    n = max(map(len, held))
    positions = torch.tensor([row + [-1] * (n - len(row)) for row in held])
    scores = torch.tensor([draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for _ in held]).float()
    window = draw(st.none() | st.integers(1, 40))
    return scores, positions, tokens, window, draw(st.integers(0, 4)), draw(st.integers(0, 6))


def naive(scores: list[float], positions: list[int], tokens: int, window: int | None, sinks: int, recent: int, n: int):
    """Indices that stay of one row: what always does, then the highest, the older first."""
    among = [j for j, at in enumerate(positions) if at >= max(0, tokens - (window or tokens))]
    rank = {j: -INFINITY if positions[j] < sinks or positions[j] >= tokens - recent else -scores[j] for j in among}
    return sorted(sorted(among, key=lambda j: (rank[j], j))[:n])


@given(rows(), st.data())
@settings(max_examples=300)
def test_the_cache_and_a_program_keep_the_same_entries(row, data: st.DataObject) -> None:
    """Ties, sinks and recent tokens, entries that left a window, rows of different lengths; some rows keep nothing."""
    scores, positions, tokens, window, sinks, recent = row
    among = candidates(positions, tokens, window)
    wanted = torch.tensor([data.draw(st.integers(0, int(k))) for k in among.sum(1)])
    ranked = protect(scores, positions, among, tokens, sinks, recent)
    expected = [
        naive(s.tolist(), p.tolist(), tokens, window, sinks, recent, int(k))
        for s, p, k in zip(scores, positions, wanted, strict=True)
    ]
    if int(wanted.max()):
        assert [kept.tolist() for kept in highest(ranked, wanted)] == expected
    # as a program does it: tensors in place of numbers, a batch, more room than is needed
    seen, n = torch.tensor([tokens]), scores.shape[1]
    batch, at = scores.expand(2, -1, -1), positions.expand(2, -1, -1)
    of_batch = protect(batch, at, candidates(at, seen, window), seen, sinks, torch.tensor([recent]))
    assert torch.equal(of_batch, ranked.expand_as(of_batch))
    places = highest_padded(of_batch, wanted, n + 3)
    for sequence in places.tolist():
        assert [[j for j in kept if j < n] for kept in sequence] == expected
        assert sequence == [kept + [n] * (n + 3 - len(kept)) for kept in expected]


def test_all_but_highest_reads_nothing_back() -> None:
    with FakeTensorMode():
        scores, positions, tokens = torch.rand(1, 2, 9), torch.zeros(1, 2, 9, dtype=torch.int64), torch.ones(1).long()
        ranked = protect(scores, positions, candidates(positions, tokens, 4), tokens, 2, tokens)
        assert highest_padded(ranked, torch.ones(2).long(), 5).shape == (1, 2, 5)
        assert moments(in_moments(positions[0, 0], 2).sum(), torch.rand(4, 8), torch.rand(4, 8, 8), 2).mean.ndim == 3
        with pytest.raises(RuntimeError):
            highest(ranked[0], torch.ones(2).long())


def test_a_head_gets_no_more_than_it_has() -> None:
    layer = LayerScores(torch.ones(2, 6), None, torch.tensor([6, 4]), 3, 0)
    assert split(Above(0.5), [layer])[0].tolist() == [6, 4]


def test_moments_of_a_program_are_those_of_the_history() -> None:
    """Of a whole prompt at once, in which what does not count is zero; and summed up as the queries come."""
    queries = torch.randn(1, 4, 30, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(30)
    history = QueryHistory()
    for part, at in zip(queries.split(7, 2), positions.split(7), strict=True):
        history.add_moments(part, at.unsqueeze(0), None, 3)
    counted = in_moments(positions, 3).float()
    chosen = queries[0] * counted.unsqueeze(-1)
    got, expected = moments(counted.sum(), chosen.sum(1), chosen.mT @ chosen, 2), history.moments(0, 2)
    assert expected is not None
    assert expected.count == 8, "every third, without the sinks"
    torch.testing.assert_close(got.mean, expected.mean)
    torch.testing.assert_close(got.covariance, expected.covariance)
    picked = queries[0].unflatten(0, (2, 2))[:, :, 6::3]
    torch.testing.assert_close(got.mean, picked.mean(2))
    centred = picked - picked.mean(2, keepdim=True)
    torch.testing.assert_close(got.covariance, centred.mT @ centred / 8)
