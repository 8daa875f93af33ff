"""What a score looks at: causal attention by true position, in blocks or whole, and pooling without edge effects."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompile.runtime import observation as observe
from kvcompile.runtime.history import QueryHistory
from kvcompile.runtime.observation import Observation, pool

HEADS, GROUP, DIM = 2, 3, 8


def observation(window: int | None = None, softcap: float | None = None, queries: int = 5) -> Observation:
    """Two rows of 9 and 6 entries with gaps in their positions; queries at the newest positions."""
    g = torch.Generator().manual_seed(0)
    positions = torch.tensor([[0, 1, 4, 6, 9, 15, 16, 17, 18], [2, 3, 15, 16, 17, 18, -1, -1, -1]])
    return Observation(
        queries=torch.randn(HEADS, GROUP, queries, DIM, generator=g),
        query_positions=torch.arange(19 - queries, 19),
        keys=torch.randn(HEADS, 9, DIM, generator=g),
        values=torch.randn(HEADS, 9, DIM, generator=g),
        positions=positions,
        lengths=torch.tensor([9, 6]),
        tokens=19,
        scale=DIM**-0.5,
        softcap=softcap,
        sliding_window=window,
    )


def naive(seen: Observation, h: int, g: int, i: int) -> list[float]:
    weights = []
    for j in range(seen.keys.shape[1]):
        ago = int(seen.query_positions[i] - seen.positions[h, j])
        hidden = ago < 0 or int(seen.positions[h, j]) < 0 or bool(seen.sliding_window and ago >= seen.sliding_window)
        logit = float(seen.queries[h, g, i].double() @ seen.keys[h, j].double()) * seen.scale
        if seen.softcap:
            logit = seen.softcap * math.tanh(logit / seen.softcap)
        weights.append(0.0 if hidden else math.exp(logit))
    return [w / max(sum(weights), 1e-300) for w in weights]


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 1.5}, {"window": 3, "softcap": 1.5}], ids=str)
def test_attention_follows_the_formula(options: dict[str, Any]) -> None:
    seen = observation(**options)
    expected = [[[naive(seen, h, g, i) for i in range(5)] for g in range(GROUP)] for h in range(HEADS)]
    torch.testing.assert_close(seen.attention(), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_attention_in_blocks_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "QUERY_BLOCK", 2)
    seen = observation()
    positions, blocks = zip(*seen.attention_blocks(), strict=True)
    assert [len(p) for p in positions] == [2, 2, 1]
    assert torch.equal(torch.cat(positions), seen.query_positions)
    torch.testing.assert_close(torch.cat(blocks, 2), seen.attention(), atol=1e-6, rtol=1e-6)


def test_a_query_that_sees_nothing_pays_nothing() -> None:
    """Everything inside its window may have been evicted: zeros, not NaN."""
    seen = observation(window=2)
    seen.positions[1] = torch.tensor([2, 3, 4, 5, 6, 7, -1, -1, -1])
    attention = seen.attention()
    assert bool(attention.isfinite().all())
    assert float(attention[1].abs().sum()) == 0


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_pooling_does_not_fade_at_the_edges(kind: Any, kernel: int) -> None:
    votes = torch.rand(2, 11, generator=torch.Generator().manual_seed(0))
    among = torch.ones(2, 11, dtype=torch.bool)
    among[0, 8:], among[1, :2] = False, False
    reduce = max if kind == "max" else lambda x: sum(x) / len(x)
    expected = votes.clone()
    for row in range(2):
        for j in among[row].nonzero().flatten().tolist():
            near = [i for i in range(max(0, j - kernel // 2), min(11, j + kernel // 2 + 1)) if among[row, i]]
            expected[row, j] = reduce(votes[row, near].tolist())
    torch.testing.assert_close(pool(votes, kernel, kind, among), expected)


# ---- what is remembered between looks


def queries(batch: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Each query's entries are its position."""
    at = torch.arange(start, start + count).expand(batch, -1)
    return at.float()[:, None, :, None].expand(batch, 4, count, DIM).clone(), at


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [3, 3, 14], [14, 3, 3], [19, 1]], ids=str)
def test_the_newest_queries_are_recalled_whatever_the_pieces(pieces: list[int]) -> None:
    watch, start = QueryHistory(), 0
    for count in pieces:
        watch.remember(*queries(2, start, count), None, 5)
        start += count
    states, at = watch.recall(1, 2, 5)
    assert at.tolist() == [15, 16, 17, 18, 19]
    assert states.shape == (2, 2, 5, DIM)
    assert states[0, 0, :, 0].tolist() == at.tolist()
    assert watch.recall(0, 2, 3)[1].tolist() == [17, 18, 19]
    held = sum(s.queries.untyped_storage().nbytes() for s in watch.segments)
    assert held <= (5 + max(5, min(pieces))) * 2 * 4 * DIM * 4, "only about the newest queries are kept alive"


def test_padding_pushes_no_real_query_out() -> None:
    watch = QueryHistory()
    states, _ = queries(2, 0, 8)
    valid = torch.tensor([[True] * 8, [True] * 3 + [False] * 5])
    watch.remember(states, valid.long().cumsum(1) - 1, valid, 2)
    assert watch.recall(1, 2, 2)[1].tolist() == [1, 2]
    assert watch.recall(0, 2, 2)[1].tolist() == [6, 7]
    for _ in range(3):  # only the first sequence goes on
        watch.remember(states[:, :, :2], torch.tensor([[8, 9], [2, 2]]), torch.tensor([[True] * 2, [False] * 2]), 2)
    assert watch.recall(1, 2, 2)[1].tolist() == [1, 2]


def test_nothing_to_recall_is_no_error() -> None:
    watch = QueryHistory()
    watch.remember(*queries(1, 0, 4), torch.zeros(1, 4, dtype=torch.bool), 2)
    states, at = watch.recall(0, 2, 2)
    assert (states.shape, at.shape) == ((2, 2, 0, DIM), (0,))
    assert watch.moments(0, 2) is None


def test_counted_queries_are_not_counted_twice() -> None:
    watch = QueryHistory()
    watch.remember(*queries(1, 0, 6), None, None)
    watch.counted(4)
    watch.remember(*queries(1, 6, 2), None, None)
    assert watch.recall(0, 2, None)[1].tolist() == [6, 7]
    assert watch.recall(0, 2, 4)[1].tolist() == [4, 5, 6, 7]


def test_memory_follows_the_beams() -> None:
    watch = QueryHistory()
    states, at = queries(2, 4, 6)
    states[1] += 100
    watch.remember(states, at, None, 4)
    watch.add_moments(states, at, None)
    watch.carried = [torch.zeros(2, 6), torch.ones(2, 6)]
    watch.arrive(torch.tensor([[True], [False]]), 2, due=False)
    watch.select(torch.tensor([1, 1, 0]))
    assert [float(watch.recall(b, 2, 1)[0][0, 0, 0, 0]) for b in range(3)] == [109, 109, 9]
    means = [float(m.mean[0, 0, 0]) for b in range(3) if (m := watch.moments(b, 2)) is not None]
    assert means == [106.5, 106.5, 6.5]
    assert [float(c.sum()) for c in watch.carried] == [12, 12, 0]
    assert watch.waiting == [False, False, True]
