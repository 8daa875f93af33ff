"""Choices and groups stand in the graph where they must, and a graph where they do not is noticed."""

from __future__ import annotations

from typing import Any

import pytest
from contract_recall import TABLE, model_of, pairs
from contract_table import Options, compiled, dense, plan_of

from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.graph import ops
from kvcompile.graph.recall import InsertRecall
from kvcompile.graph.wiring import appends, attends, groupings, selections, wiring
from kvcompile.models.sharing import shared

QUEST = TABLE["quest"].stack()
ALTERNATING: Options = {"cla": {"pattern": [0, 1, 0, 1]}, **QUEST}


def placed(graph: Any) -> dict[Any, int]:
    return {node: i for i, node in enumerate(graph.nodes)}


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize(("name", "beside"), pairs("alone", "cla", "mla", "snapkv", "adakv", "kivi, paged, offload"))
def test_the_nodes_stand_where_they_must(name: str, beside: str, architecture: str) -> None:
    """A choice by each reader's own queries right before it attends; groups after all readers and the selection."""
    model = compiled(ALTERNATING, architecture, "sdpa") if beside == "cla" else model_of(name, beside, architecture)
    graph, plan = model.kvcompile.graph.graph, model.kvcompile.plan
    graph.lint()
    place, reads = placed(graph), wiring(graph)
    owners = [p.index for p in plan.owners if p.recall]
    assert owners == [p.index for p in plan.owners if not p.sliding_window]
    for index, node in attends(graph).items():
        chosen = node.kwargs.get("chosen")
        assert (chosen is not None) == (reads[index] in owners)
        if chosen is not None:
            assert chosen.target is ops.recall
            assert chosen.args == node.args[:4]
            assert place[appends(graph)[reads[index]]] < place[chosen] == place[node] - 1
    assert sorted(groupings(graph)) == owners
    for index, node in groupings(graph).items():
        assert all(place[a] < place[node] for i, a in attends(graph).items() if reads[i] == index)
        assert index not in selections(graph) or place[selections(graph)[index]] < place[node]
        later = [n for n in place if n.target in (ops.flush, ops.to_host) and n.args[-1] == index]
        assert all(place[n] > place[node] for n in later)
    assert model.kvcompile.changes["InsertRecall"] == len(owners)


def test_layers_without_a_recall_have_none_of_it() -> None:
    model = compiled(TABLE["quest"].stack(skip_layers=[0, 3]), kernels="sdpa")
    graph = model.kvcompile.graph.graph
    assert sorted(groupings(graph)) == [1, 2]
    assert [i for i, node in attends(graph).items() if node.kwargs.get("chosen")] == [1, 2]
    plain = compiled({}, kernels="sdpa").kvcompile
    assert "InsertRecall" not in plain.changes
    assert not groupings(plain.graph.graph)


def own(stack: Options) -> Any:
    """A compiled model that may be changed."""
    return compile_plan(shared(dense()), plan_of(stack), "sdpa")


def test_a_missing_choice_is_noticed() -> None:
    module, plan = (model := own(QUEST)).kvcompile.graph, model.kvcompile.plan
    InsertRecall(plan).ensures(module)
    node = attends(module.graph)[2]
    node.update_kwarg("chosen", None)
    with pytest.raises(KvcompileError, match="layer 2 must attend to what its own queries choose"):
        InsertRecall(plan).ensures(module)


def test_the_choice_of_another_layer_is_noticed() -> None:
    module, plan = (model := own(QUEST)).kvcompile.graph, model.kvcompile.plan
    nodes = attends(module.graph)
    nodes[2].update_kwarg("chosen", nodes[1].kwargs["chosen"])
    with pytest.raises(KvcompileError, match="layer 2 must attend to what its own queries choose"):
        InsertRecall(plan).ensures(module)


def test_groups_that_are_made_too_early_or_not_at_all_are_noticed() -> None:
    for stack in (QUEST, TABLE["quest"].stack("snapkv"), {"cla": {}, **QUEST}):
        module, plan = (model := own(stack)).kvcompile.graph, model.kvcompile.plan
        grouped = groupings(module.graph)
        appends(module.graph)[2].append(grouped[2])
        with pytest.raises(KvcompileError, match="layer 2 must be grouped after its readers"):
            InsertRecall(plan).ensures(module)
        module.graph.erase_node(grouped[2])
        with pytest.raises(KvcompileError, match="every layer with a recall must be grouped once"):
            InsertRecall(plan).ensures(module)
