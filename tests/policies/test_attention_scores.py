"""The scores that look at attention say what their papers define, entry by entry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from observation import naive_attention, observation, same

from kvcompile.plan.selection import LayerScores
from kvcompile.policies.corm import CORM, LastImportant, Threshold
from kvcompile.policies.dropkv import DropKV, WindowChange, output_change
from kvcompile.policies.h2o import H2O, AccumulatedAttention
from kvcompile.policies.snapkv import SnapKV, WindowAttention
from kvcompile.policies.tova import TOVA, LastAttention

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no group": {"group": 1, "heads": 3},
    "ragged": {"lengths": [37, 19]},
    "soft-cap": {"softcap": 0.7},
    "sliding": {"sliding_window": 11},
    "one query": {"window": 1},
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def seen(request: pytest.FixtureRequest) -> Any:
    return observation(**request.param)


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_snapkv_pools_votes_of_the_entries_before_the_window(seen: Any, kernel: int, pooling: Any, reduce: Any) -> None:
    attention = naive_attention(seen)
    votes = attention.mean((1, 2)) if reduce == "mean" else attention.amax((1, 2))
    expected = votes.clone()
    for h, row in enumerate(seen.positions.tolist()):
        before = [j for j, at in enumerate(row) if 0 <= at < int(seen.query_positions[0])]
        for j in before if kernel > 1 else []:
            near = [votes[h, i] for i in before if abs(i - j) <= kernel // 2]
            expected[h, j] = max(near) if pooling == "max" else sum(near) / len(near)
    same(WindowAttention(seen.queries.shape[2], kernel, pooling, reduce).score(seen), expected, seen)


def test_tova_averages_the_last_query_over_all_heads(seen: Any) -> None:
    expected = naive_attention(seen)[:, :, -1].mean((0, 1)).expand(seen.keys.shape[0], -1)
    scores = LastAttention().score(seen)
    same(scores, expected, seen)
    assert torch.equal(scores, scores[:1].expand_as(scores))


def test_h2o_adds_the_attention_of_every_query(seen: Any) -> None:
    carried = torch.rand(seen.positions.shape)
    expected = carried + naive_attention(seen).mean(1).sum(1)
    same(AccumulatedAttention().observe(replace(seen, carried=carried)), expected, seen)
    same(AccumulatedAttention().observe(seen), expected - carried, seen)


def test_h2o_and_corm_in_parts_equal_one_look() -> None:
    whole = observation(window=31, entries=31)
    cut = 13
    first = replace(
        whole,
        queries=whole.queries[:, :, :cut],
        query_positions=whole.query_positions[:cut],
        keys=whole.keys[:, :cut],
        values=whole.values[:, :cut],
        positions=whole.positions[:, :cut],
    )
    for score in (AccumulatedAttention(), LastImportant()):
        carried = torch.nn.functional.pad(score.observe(first), (0, 31 - cut))
        rest = replace(
            whole, queries=whole.queries[:, :, cut:], query_positions=whole.query_positions[cut:], carried=carried
        )
        torch.testing.assert_close(score.observe(rest), score.observe(whole), rtol=1e-5, atol=1e-6)


def test_corm_remembers_the_last_query_that_found_a_key_important(seen: Any) -> None:
    attention = naive_attention(seen)
    expected = torch.zeros(seen.positions.shape)
    for i, asked in enumerate(seen.query_positions.tolist()):
        visible = min(asked + 1, seen.sliding_window or asked + 1)
        important = (attention[:, :, i] >= 1 / visible).any(1)
        expected[important] = asked
    same(LastImportant().observe(seen), expected, seen)


def test_dropkv_measures_what_the_outputs_lose_with_an_entry(seen: Any) -> None:
    """Each output without entry j, its softmax spread over the others, against the output with it."""
    attention, values = naive_attention(seen), seen.values.double()
    outputs = attention @ values.unsqueeze(1)
    expected = torch.zeros(seen.positions.shape, dtype=torch.float64)
    for j in range(attention.shape[-1]):
        others = attention.clone()
        others[..., j] = 0
        others /= 1 - attention[..., j : j + 1]
        expected[:, j] = (others @ values.unsqueeze(1) - outputs).square().sum((1, 2, 3))
    same(WindowChange(seen.queries.shape[2]).score(seen), expected, seen)


def test_dropkv_stays_exact_where_one_entry_gets_nearly_all() -> None:
    """There o is near v_j, and the large factor in front must not multiply rounding."""
    rest = 2.0**-16
    attention = torch.tensor([1 - rest, rest]).view(1, 1, 1, 2)
    values = torch.tensor([[[3.0, -2.0], [4.0, -3.0]]])  # v_j - o is (1, -1) or that times `rest`
    expected = torch.tensor([[2 * (1 - rest) ** 2, 2 * rest**2]])
    torch.testing.assert_close(output_change(attention, values), expected, atol=0, rtol=1e-5)
    alone = output_change(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 2))
    assert torch.isfinite(alone).all()


@pytest.mark.parametrize("entries", [7, 333, 1000])
def test_corm_finds_uniform_attention_important(entries: int) -> None:
    seen = observation(entries=entries, window=1, queries=torch.zeros(2, 3, 1, 8))
    assert (LastImportant().observe(seen) == entries - 1).all()


def test_corm_counts_what_was_important_within_the_window() -> None:
    last = torch.tensor([[0.0, 0.0, 70.0, 91.0, 90.0, float("inf")], [float("inf"), 99.0, *[float("-inf")] * 4]])
    look = LayerScores(last, None, torch.tensor([6, 2]), budget=6, floor=1, newest=100)
    assert Threshold(10).allot([look])[0].tolist() == [2, 2]  # 91 is within the last 10 queries (91..100), 90 is not
    assert Threshold(200).allot([look])[0].tolist() == [6, 2]  # fewer queries than the window: nothing can go


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("kind", [SnapKV, TOVA, H2O], ids=["snapkv", "tova", "h2o"])
def test_a_key_that_the_queries_ask_for_survives(kind: Any, kernel: int) -> None:
    seen, needle = observation(entries=120, window=8), 41
    keys = seen.keys.clone()
    keys[:, needle] = 6 * seen.queries.mean((1, 2))
    seen = replace(seen, keys=keys, queries=seen.queries.mean((1, 2), keepdim=True).expand_as(seen.queries))
    policy = SnapKV(window=8, kernel=kernel) if kind is SnapKV else kind()
    score = policy.score()
    if score.needs.carries:
        seen = replace(seen, carried=score.observe(seen))
    scores = score.score(seen)[:, :112]
    assert (scores.argmax(1) == needle).all() if kind is not SnapKV else True
    if kind is SnapKV:
        near = set(range(needle - kernel // 2, needle + kernel // 2 + 1))
        assert all(set(row.topk(kernel).indices.tolist()) == near for row in scores)


def test_corm_keeps_the_needle() -> None:
    seen, needle = observation(entries=120, window=8), 41
    keys = seen.keys.clone()
    keys[:, needle] = 6 * seen.queries[:, 0, -1]
    assert (LastImportant().observe(replace(seen, keys=keys))[:, needle] == 119).all()


def test_always_kept_tokens_of_each_policy() -> None:
    assert SnapKV(window=16).selection().protected(100) == (4, 16)
    assert DropKV(window=16).selection().protected(100) == (4, 16)
    assert TOVA().selection().protected(100) == (0, 1)
    assert H2O().selection().protected(100) == (0, 50)
    assert H2O(sinks=4).selection().protected(6) == (4, 2)
    assert CORM().selection().protected(1000) == (0, 256)
    assert CORM().selection().budget is None
