"""The scores that look at keys, values, query statistics or positions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from observation import observation, same
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.policies import expected_attention
from kvcompile.policies.expected_attention import ExpectedAttention, FutureAttention
from kvcompile.policies.keydiff import Dissimilarity
from kvcompile.policies.knorm import LowNorm
from kvcompile.policies.random import Random, Uniformly
from kvcompile.policies.streaming import Recency, Streaming
from kvcompile.runtime.observation import Moments, Observation

CASES: dict[str, dict[str, Any]] = {"plain": {}, "ragged": {"lengths": [37, 19]}, "sliding": {"sliding_window": 11}}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def seen(request: pytest.FixtureRequest) -> Observation:
    return observation(**request.param)


def visible(seen: Observation, h: int) -> list[int]:
    oldest = seen.tokens - seen.sliding_window + 1 if seen.sliding_window else 0
    return [j for j, at in enumerate(seen.positions[h].tolist()) if at >= max(0, oldest)]


def test_knorm_is_the_negative_norm(seen: Observation) -> None:
    same(LowNorm().score(seen), -(seen.keys.double() ** 2).sum(-1).sqrt(), seen)


def test_keydiff_is_the_negative_cosine_to_the_mean_of_unit_keys(seen: Observation) -> None:
    expected = torch.zeros(seen.positions.shape, dtype=torch.float64)
    for h in range(expected.shape[0]):
        keys = [k / math.sqrt(float(k @ k)) for k in seen.keys[h].double()]
        mean = sum(keys[j] for j in visible(seen, h)) / len(visible(seen, h))
        for j, key in enumerate(keys):
            expected[h, j] = -(key @ mean) / math.sqrt(float(mean @ mean))
    same(Dissimilarity().score(seen), expected, seen)


def rotation(position: int, dim: int) -> Tensor:
    """The matrix of `rotate` at one position, for row vectors."""
    out = torch.zeros(dim, dim, dtype=torch.float64)
    for i in range(dim // 2):
        angle = position * 10000 ** (-2 * i / dim)
        out[i, i] = out[i + dim // 2, i + dim // 2] = math.cos(angle)
        out[i, i + dim // 2], out[i + dim // 2, i] = math.sin(angle), -math.sin(angle)
    return out


def with_moments(seen: Observation, horizon: int) -> Observation:
    heads, group, _, dim = seen.queries.shape
    factor = torch.randn(heads, group, dim, dim, generator=torch.Generator().manual_seed(1))
    turns = sum(rotation(seen.tokens + t, dim) for t in range(horizon)) / horizon
    moments = Moments(33, seen.queries[:, :, 0], factor @ factor.mT / dim)
    return replace(seen, moments=moments, mean_rotation=lambda asked: turns.float() if asked == horizon else None)


@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_expected_attention_is_the_gaussian_mean_times_the_value_norm(seen: Observation, epsilon: float) -> None:
    seen, horizon = with_moments(seen, 16), 16
    turns = seen.mean_rotation(horizon).double()
    expected = torch.zeros(seen.positions.shape, dtype=torch.float64)
    heads, group = seen.queries.shape[:2]
    for h in range(heads):
        for g in range(group):
            mean = turns.T @ seen.moments.mean[h, g].double()
            spread = turns.T @ seen.moments.covariance[h, g].double() @ turns
            logits = {j: seen.keys[h, j].double() for j in visible(seen, h)}
            logits = {j: float(k @ mean) / 8**0.5 + float(k @ spread @ k) / 16 for j, k in logits.items()}
            total = sum(math.exp(x) for x in logits.values())
            for j, x in logits.items():
                expected[h, j] += math.exp(x) / total / group
    expected = (expected + epsilon) * (seen.values.double() ** 2).sum(-1).sqrt()
    same(FutureAttention(horizon, epsilon).score(seen), expected, seen)


def test_expected_attention_averages_neighbours_of_a_row(seen: Observation) -> None:
    seen = with_moments(seen, 16)
    plain = FutureAttention(16, 0.01).score(seen).double()
    expected = plain.clone()
    for h in range(plain.shape[0]):
        for j in visible(seen, h):
            near = [i for i in range(j - 2, j + 3) if i in visible(seen, h)]
            expected[h, j] = plain[h, near].mean()
    same(FutureAttention(16, 0.01, 5).score(seen), expected, seen)
    with pytest.raises(KvcompileError, match=r"stack\.expected_attention: kernel must be odd"):
        ExpectedAttention(kernel=2)


def test_expected_attention_is_the_same_in_blocks_of_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = with_moments(observation(lengths=[37, 19]), 16)
    whole = FutureAttention(16, 0.01).score(seen)
    monkeypatch.setattr(expected_attention, "ENTRY_BLOCK", 8)
    same(FutureAttention(16, 0.01).score(seen), whole, seen)


def test_expected_attention_predicts_sampled_queries() -> None:
    seen = with_moments(observation(group=1, heads=1, entries=9, window=1), 1)
    moments, turn = seen.moments, seen.mean_rotation(1).double()
    torch.manual_seed(0)
    drawn = torch.distributions.MultivariateNormal(moments.mean[0, 0].double(), moments.covariance[0, 0].double())
    weights = torch.exp(drawn.sample((200_000,)) @ turn @ seen.keys[0].double().T * seen.scale).mean(0)
    scores = FutureAttention(1, 0.0).score(seen)[0].double() / torch.linalg.vector_norm(seen.values[0].double(), dim=-1)
    torch.testing.assert_close(scores, weights / weights.sum(), rtol=0.03, atol=0.003)


def test_expected_attention_keeps_the_key_that_the_mean_query_asks_for() -> None:
    seen = with_moments(observation(entries=60, group=1), 1)
    keys = seen.keys.clone()
    keys[:, 23] = 6 * (seen.moments.mean[:, 0] @ seen.mean_rotation(1))
    seen = replace(seen, keys=keys, values=torch.ones_like(seen.values))
    assert (ExpectedAttention(horizon=1, kernel=1).score().score(seen).argmax(1) == 23).all()


def test_expected_attention_without_moments_ranks_by_value_norm() -> None:
    seen = observation(entries=3, window=1)
    same(ExpectedAttention().score().score(seen), (seen.values.double() ** 2).sum(-1).sqrt(), seen)


def test_streaming_keeps_the_newest(seen: Observation) -> None:
    same(Recency().score(seen), seen.positions, seen)
    assert Streaming(positions="compact").selection().positions == "compact"
    with pytest.raises(KvcompileError, match=r"stack\.streaming: positions must be original or compact"):
        Streaming(positions="new")  # type: ignore[arg-type]


def test_random_depends_on_seed_layer_and_tokens_alone(seen: Observation) -> None:
    score = Random(seed=3).score()
    scores = score.score(seen)
    other = replace(seen, keys=seen.keys + 1, queries=seen.queries[:, :, :1])
    assert torch.equal(score.score(other), scores)
    for changed in (Uniformly(4).score(seen), score.score(replace(seen, layer=1))):
        assert not torch.equal(changed, scores)


def test_random_gives_a_token_the_same_number_in_any_row() -> None:
    whole = observation(entries=50, seed=1)
    part = observation(entries=50, lengths=[20, 11], seed=2)
    numbers = Uniformly(0).score(whole)
    for h, length in enumerate([20, 11]):
        at = part.positions[h, :length]
        assert torch.equal(Uniformly(0).score(part)[h, :length], numbers[h, at])


def test_random_is_uniform() -> None:
    scores = Uniformly(0).score(observation(entries=4000, heads=4))
    assert abs(scores.mean().item() - 0.5) < 0.02
    assert abs(scores.var().item() - 1 / 12) < 0.005
    assert abs(torch.corrcoef(scores)[0, 1].item()) < 0.05
