"""LMBO: the identity behind its errors, and brute force over every budget, with and without sinks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model
from torch import Tensor

from kvcompile.analysis import lmbo
from kvcompile.analysis.attention import Observer, mean_attention
from kvcompile.analysis.lmbo import LMBO, truncations
from kvcompile.runtime.observation import Observation

torch.manual_seed(0)
ATTENTION = (3 * torch.randn(2, 3, 5, 41, dtype=torch.float64)).softmax(-1)  # [H_kv, g, w, n]
VALUES = torch.randn(2, 41, 7)


def seen(sinks: bool = False) -> Observation:
    """Only values, and whether there are sinks, are read of it."""
    nothing = torch.zeros(2, 3, 5, 7)
    at = torch.arange(41)
    learned = torch.zeros(2, 3) if sinks else None
    return Observation(nothing, at[:5], VALUES, VALUES, at.expand(2, -1), at[:2], 41, 1.0, sinks=learned)


def truncated(weights: Tensor, values: Tensor, kept: Tensor, sink: float) -> Tensor:
    """The output that a softmax over the kept entries, and a sink, would give."""
    chosen = weights[kept].double()
    return (chosen.unsqueeze(-1) * values[kept].double()).sum(0) / (chosen.sum() + sink)


@pytest.mark.parametrize("sink", [0.0, 0.25])
def test_the_error_is_dropped_mass_times_displacement(sink: float) -> None:
    weights, values = ATTENTION[0, 0, 0] * (1 - sink), VALUES[0]
    product, length, error = truncations(weights, values, weights, sinks=sink > 0)
    order = weights.argsort(descending=True)
    whole = truncated(weights, values, order, sink)
    for b in range(1, 41):
        kept, dropped = order[:b], order[b:]
        output = truncated(weights, values, kept, sink)
        mass = weights[dropped].sum()
        mean = (weights[dropped].unsqueeze(-1) * values[dropped].double()).sum(0) / mass
        torch.testing.assert_close(whole - output, mass * (mean - output), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(error[b - 1], (whole - output).square().sum(), rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(product[b - 1], whole @ output, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(length[b - 1], output @ output, rtol=1e-10, atol=1e-12)
    assert error[-1] == 0


def test_tiny_errors_are_not_lost_in_rounding() -> None:
    """The last of many entries holds 1e-14 of the attention: the error without it has all its digits."""
    weights = torch.tensor([0.5, 0.5, 1e-14], dtype=torch.float64)
    values = torch.tensor([[1.0], [1.0], [3.0]], dtype=torch.float64)
    error = truncations(weights, values, weights)[2].sqrt()
    assert float(error[1]) == pytest.approx(2e-14, rel=1e-6, abs=0)


def brute(analysis: LMBO, attention: Tensor, sink: float) -> tuple[list[float], list[list[float]]]:
    """By row: the layer's budget, and each head's, trying every B."""
    ranks = attention.mean(1, keepdim=True).expand_as(attention) if analysis.heads == "kv" else attention
    groups = [[(h, g) for g in range(3)] for h in range(2)]
    units = groups if analysis.heads == "kv" else [[pair] for group in groups for pair in group]
    everything = [pair for unit in units for pair in unit]

    def output(unit: Any, row: int, count: int) -> Tensor:
        parts = []
        for h, g in unit:
            kept = ranks[h, g, row].argsort(descending=True)[:count]
            parts.append(truncated(attention[h, g, row], VALUES[h], kept, sink))
        return torch.cat(parts)

    def least(unit: Any, row: int) -> float:
        whole = output(unit, row, 41)
        for count in range(1, 42):
            part = output(unit, row, count)
            cosine = torch.cosine_similarity(whole, part, dim=0)
            likeness = cosine if analysis.similarity == "cosine" else 1 - (whole - part).norm() / whole.norm()
            if likeness >= analysis.threshold:
                return float(count)
        return 41.0

    layers = [least(everything, row) for row in range(5)]
    return layers, [[least(unit, row) for row in range(5)] for unit in units]


@pytest.mark.parametrize("similarity", ["cosine", "error"])
@pytest.mark.parametrize("heads", ["query", "kv"])
@pytest.mark.parametrize("threshold", [0.7, 0.95])
@pytest.mark.parametrize("sink", [0.0, 0.25])
def test_lmbo_is_its_definition(
    similarity: Any, heads: Any, threshold: float, sink: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmbo, "NUMBERS", 2 * 3 * 41 * 7)  # two rows at a time
    analysis = LMBO(heads=heads, similarity=similarity, threshold=threshold)
    layers, by_head = analysis.budgets(ATTENTION * (1 - sink), seen(sink > 0))
    expected = brute(analysis, ATTENTION * (1 - sink), sink)
    assert layers.tolist() == expected[0]
    assert by_head.tolist() == expected[1]


def test_one_token_is_enough_for_one_hot_attention_and_all_for_equality() -> None:
    one_hot = torch.eye(41)[:5].expand(2, 3, 5, 41)
    assert LMBO(threshold=1.0).budgets(one_hot, seen())[0].tolist() == [1.0] * 5
    assert LMBO(threshold=1.0, similarity="error").budgets(ATTENTION, seen())[0].tolist() == [41.0] * 5


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_whole_outputs_are_those_of_the_model(name: str) -> None:
    """Attention and values that are observed give what the attention of transformers gives its output projection."""
    model, ids = tiny_model(name), tiny_ids(1, 30)
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0, -1]))
    with torch.no_grad():
        model(ids)
    outputs: list[Tensor] = []
    Observer(tiny_model(name), 1).look(
        ids[0].tolist(), lambda s: outputs.append((mean_attention(s) @ s.values.double()).flatten())
    )
    for expected, output in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(output.float(), expected, rtol=1e-4, atol=1e-5)
