"""Prefetches, fetches and parks stand in the graph where they must, and a graph where they do not is noticed."""

from __future__ import annotations

from typing import Any

import pytest
from contract_table import Options, dense, plan_of
from offloading import STACKS, offloaded

from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.graph import ops
from kvcompile.graph.offload import InsertOffload
from kvcompile.graph.wiring import appends
from kvcompile.models.sharing import shared


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_the_moves_stand_in_the_graph_where_they_must(stack: Options) -> None:
    """Prefetch after the fetch before it, fetch before the append, park after the layer's last use."""
    model = offloaded(stack, fields={"skip_layers": [1]})
    graph, plan = model.kvcompile.graph.graph, model.kvcompile.plan
    graph.lint()
    mine = [p.index for p in plan.layers if p.storage.offload]
    place = {node: i for i, node in enumerate(graph.nodes)}
    at = {(n.target, n.args[1]): i for n, i in place.items() if n.target in (ops.prefetch, ops.fetch, ops.to_host)}
    assert mine
    assert 1 not in mine
    assert sorted(at.values()) == sorted(at[op, i] for op in (ops.prefetch, ops.fetch, ops.to_host) for i in mine)
    begin = next(i for n, i in place.items() if n.target is ops.begin)
    for before, i in zip([None, *mine], mine, strict=False):
        assert at[ops.prefetch, i] == (begin if before is None else at[ops.fetch, before]) + 1
        kv = appends(graph)[i]
        uses = [n for n in kv.users if n.target is not ops.flush or "zigzag" not in stack]
        assert (
            at[ops.prefetch, i] < at[ops.fetch, i] < place[kv] < max(map(place.__getitem__, uses)) < at[ops.to_host, i]
        )
    assert model.kvcompile.changes["InsertOffload"] == len(mine)


@pytest.mark.parametrize("op", [ops.prefetch, ops.fetch, ops.to_host])
def test_a_missing_or_misplaced_move_is_noticed(op: Any) -> None:
    model = compile_plan(shared(dense()), plan_of({"offload": {}}))  # not `offloaded`: it is changed here
    module, plan = model.kvcompile.graph, model.kvcompile.plan
    InsertOffload(plan).ensures(module)
    node = next(n for n in module.graph.nodes if n.target is op and n.args[1] == 2)
    fetched = next(n for n in module.graph.nodes if n.target is ops.fetch and n.args[1] == 2)
    (appends(module.graph)[2] if op is ops.fetch else fetched).append(node)  # too late, too late, too early
    with pytest.raises(KvcompileError, match="layer 2 must be"):
        InsertOffload(plan).ensures(module)
    module.graph.erase_node(node)
    with pytest.raises(KvcompileError, match="layer 2 must be prefetched, fetched and parked once"):
        InsertOffload(plan).ensures(module)
