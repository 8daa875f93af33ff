"""The proof of a compile: bytes held on the device, in host memory and read per step are measured, or it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_table import compiled, plan_of
from tiny import tiny_ids

from kvcompile.errors import KvcompileError
from kvcompile.evaluation.proof import prove
from kvcompile.plan.plan import Plan
from kvcompile.recall.index import Index
from kvcompile.runtime.layer import LayerCache

QUEST = {"quest": {"budget": 16, "page": 4, "sinks": 2, "recent": 4, "every": 4, "skip_layers": [0]}}


def test_a_step_reads_a_part_and_the_index() -> None:
    model = compiled(QUEST, kernels="sdpa")
    rows, _ = prove(model, tiny_ids(1, 60))
    entry, groups = 2 * 16 * 4, 13  # 54 of 60 tokens are old enough, whole pages of them in groups
    assert [r.index_bytes for r in rows] == [0, *[2 * groups * (2 * 16 * 4 + 8)] * 3]
    assert [r.read - r.index_bytes for r in rows] == [2 * 61 * entry, *[2 * (2 + 16 + 6 + 1) * entry] * 3]
    assert [r.dense_read for r in rows] == [2 * 61 * entry] * 4
    assert [r.recalls for r in rows] == [False, True, True, True]
    assert rows[0].cluster_recall is None
    assert all(16 / 52 < (r.cluster_recall or 0) < 1 for r in rows[1:]), "better than chance, and no perfect choice"
    planned = model.kvcompile.plan.bytes(1, 60)
    assert [(r.index_bytes, r.read) for r in rows] == [(r.index_bytes, r.read) for r in planned]


def test_layers_without_a_recall_read_what_they_hold() -> None:
    """And layers that share a cache each read it; one token is new."""
    for stack, share in (({}, 1), ({"cla": {}}, 2), ({"gqa": {}}, 1)):
        rows, _ = prove(compiled(stack, kernels="sdpa"), tiny_ids(1, 60))
        held = sum(r.bytes for r in rows)
        assert sum(r.read for r in rows) == share * held // 60 * 61


@pytest.mark.parametrize("chunk", [0, 7])
def test_a_split_that_the_input_decides_is_proven_by_the_tokens_kept(chunk: int) -> None:
    for first in (
        {"adakv": {"budget": 40, "decode_every": 0}},
        {"corm": {"window": 8, "recent": 4, "decode_every": 0}},
    ):
        rows, _ = prove(compiled({**first, **QUEST}, kernels="sdpa", prefill_chunk=chunk), tiny_ids(1, 100))
        assert [r.read for r in rows] == [r.planned_read for r in rows]
        assert all(r.planned is None for r in rows)
        assert all(r.index_bytes for r in rows[1:])


def read_everything(self: LayerCache, queries: Any, step: Any, layer: int) -> None:
    return None


def test_a_step_that_reads_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerCache, "recall", read_everything)
    with pytest.raises(KvcompileError, match="a decode step must read the planned bytes of layer 1, got 15616 where"):
        prove(compiled(QUEST, kernels="sdpa"), tiny_ids(1, 60))


def test_an_index_of_another_size_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Index, "nbytes", lambda self: 17)
    with pytest.raises(KvcompileError, match="layer 1 must hold the planned bytes of its index, got 17 where"):
        prove(compiled(QUEST, kernels="sdpa"), tiny_ids(1, 60))


@torch.no_grad()
def test_a_batch_holds_and_reads_what_is_planned_of_it() -> None:
    model = compiled(QUEST, kernels="sdpa")
    cache = model(tiny_ids(3, 60)).past_key_values
    planned = plan_of(QUEST).bytes(3, 60)
    assert cache.index_bytes() == sum(r.index_bytes for r in planned)
    cache.reads = {}
    model(tiny_ids(3, 1), past_key_values=cache)
    assert cache.reads == {r.index: r.read for r in planned}


def test_the_plan_reads_no_more_than_it_holds() -> None:
    """But the token that is new, where nothing is recalled."""
    plan: Plan = plan_of({"snapkv": {"budget": 0.5}})
    for row in plan.bytes(1, 60):
        assert row.read == row.bytes + 2 * 2 * 16 * 4
