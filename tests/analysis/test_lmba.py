"""LMBA against its definition, read off transformers' own attention; rows, heads, windows and chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model
from torch import Tensor

from kvcompile.analysis import attention
from kvcompile.analysis.attention import Observer
from kvcompile.analysis.lmba import LMBA
from kvcompile.runtime.observation import Observation

IDS = tiny_ids(1, 70)[0].tolist()


def eager(model: Any) -> list[Tensor]:
    """Attention of every layer, `[H, n, n]`, as transformers computes it."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(torch.tensor([IDS]), output_attentions=True).attentions
    return [layer[0] for layer in found]


def minimal(row: Tensor, mass: float) -> int:
    total, held = row.double().sum(), 0.0
    for count, value in enumerate(sorted(row.double().tolist(), reverse=True), 1):
        held += value
        if held >= mass * total:
            return count
    return len(row)


def budgets(model: Any, analysis: LMBA) -> tuple[list[float], list[list[float]]]:
    """By layer and by head, as `measure` finds them."""
    from kvcompile.analysis.base import Subject
    from kvcompile.analysis.parts import Parts
    from kvcompile.config.schema import Config
    from kvcompile.progress import silent

    class Nowhere(Parts):
        def __init__(self) -> None:
            pass

    subject = Subject(model, None, Config(), Nowhere(), silent)
    part = analysis._of(subject, Observer(model, analysis.queries or None), IDS, "")
    return part["layers"], part["heads"]


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("queries", [0, 5])
@pytest.mark.parametrize("per", ["mean", "each"])
@pytest.mark.parametrize("heads", ["query", "kv"])
def test_lmba_is_its_definition(name: str, queries: int, per: Any, heads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 4 * 70 * 7)  # several blocks, the last of them shorter
    layers, by_head = budgets(tiny_model(name), LMBA(queries, per, heads, 0.9))
    for layer, full in enumerate(eager(tiny_model(name))):
        rows = full[:, -queries:] if queries else full
        if heads == "kv":
            rows = rows.unflatten(0, (2, -1)).mean(1)
        if per == "mean":
            rows = rows.double().mean(1, keepdim=True)
        expected = torch.tensor([[minimal(row, 0.9) for row in head] for head in rows]).double().mean(1)
        torch.testing.assert_close(torch.tensor(by_head[layer]).double(), expected, rtol=0, atol=1e-4)
        assert layers[layer] == pytest.approx(float(expected.mean()), abs=1e-4)


def seen(rows: Tensor) -> Observation:
    """An observation that nothing is read of but its number of queries."""
    nothing = torch.zeros(1, 1, rows.shape[2], 1)
    at = torch.arange(rows.shape[2])
    return Observation(nothing, at, nothing[0], nothing[0], at.view(1, -1), at[:1] + 1, rows.shape[3], 1.0)


def test_uniform_attention_needs_its_share_and_one_hot_one() -> None:
    uniform = torch.full((1, 1, 1, 40), 1 / 40)
    one_hot = torch.eye(40).view(1, 1, 40, 40)
    assert LMBA(mass=0.9).budgets(uniform, seen(uniform))[1].tolist() == [[36.0]]
    assert LMBA(mass=0.9).budgets(one_hot, seen(one_hot))[1].tolist() == [[1.0] * 40]
