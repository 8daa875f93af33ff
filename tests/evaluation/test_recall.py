"""Cluster recall: the share of the tokens that score highest which a step reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_table import compiled
from tiny import tiny_ids

from kvcompile.errors import KvcompileError
from kvcompile.evaluation.recall import cluster_recall, decoded_recall, metered

FIELDS: dict[str, Any] = {"sinks": 2, "recent": 4, "tokens_per_cluster": 4, "skip_layers": [0]}


def test_the_share_of_the_best_that_is_read() -> None:
    keys = torch.eye(6)
    query = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    assert cluster_recall(query, keys, torch.tensor([0, 1, 2])) == 1
    assert cluster_recall(query, keys, torch.tensor([0, 4, 5])) == pytest.approx(1 / 3)
    assert cluster_recall(torch.cat((query, -query)), keys, torch.tensor([0, 1])) == 0.5, "the mean over query heads"


def test_each_choice_of_a_decoded_token_is_measured() -> None:
    model = compiled({"clusterkv": {**FIELDS, "budget": 30}}, kernels="sdpa")
    with torch.no_grad():
        cache = model(tiny_ids(2, 80)).past_key_values
    graph = model.kvcompile.graph
    found = decoded_recall(model, cache, tiny_ids(2, 5, 1))
    assert list(found) == [1, 2, 3]
    assert all(30 / 74 < share <= 1 for share in found.values()), "no better than chance"
    assert model.kvcompile.graph is graph
    assert cache.seen == [85, 85]


def test_a_better_choice_is_worth_more() -> None:
    """Single keys are chosen by their own scores; clusters by their means."""
    ids, found = tiny_ids(1, 84), []
    for tokens in (1, 20):
        fields = {**FIELDS, "tokens_per_cluster": tokens, "budget": 20}
        model = compiled({"clusterkv": fields}, "gpt_neox", kernels="sdpa")  # one query head for each KV head
        with torch.no_grad():
            cache = model(ids[:, :80]).past_key_values
        with metered(model) as recalls, torch.no_grad():
            model(ids[:, 80:81], past_key_values=cache)
        assert all(len(numbers) == 4 for numbers in recalls.values()), "one for each head"
        found.append(sum(map(sum, recalls.values())) / 12)
    assert found[0] == 1
    assert found[1] < 0.9


def test_steps_without_a_choice_are_refused() -> None:
    model = compiled({"clusterkv": {**FIELDS, "budget": 1000}}, kernels="sdpa")
    with torch.no_grad():
        cache = model(tiny_ids(1, 40)).past_key_values
    with pytest.raises(KvcompileError, match="none did"):
        decoded_recall(model, cache, tiny_ids(1, 2, 1))
