"""The pass of the block transformer: each decoder has its own step, and one graph leaves the lower one out."""

from __future__ import annotations

import dataclasses

import pytest
from blocks_working import compiled, plan_of

from kvcompile.errors import KvcompileError
from kvcompile.graph import block_ops, ops
from kvcompile.graph.blocks import InsertBlocks
from kvcompile.graph.wiring import appends, attends

STACK = {"block_transformer": {}, "snapkv": {"budget": 8, "window": 4, "sinks": 0}, "kivi": {}, "offload": {}}


def test_layers_read_the_step_of_their_own_decoder() -> None:
    graph = compiled().kvcompile.graph.graph
    steps = {index: node.args[3].target for index, node in appends(graph).items()}
    assert steps == {0: block_ops.block_step, 1: block_ops.block_step, 2: block_ops.token_step, 3: block_ops.token_step}
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    assert calls.count("model.model.rotary_emb") == 2
    assert calls.index("model.model.block_embedder") < calls.index("model.model.block_expansion")
    closed = [node.args[2] for node in graph.nodes if node.target is block_ops.close]
    assert closed == [2, 3]


@pytest.mark.parametrize("stack", [{"block_transformer": {}}, STACK], ids=["alone", "selected, encoded, offloaded"])
def test_inside_a_block_nothing_of_the_lower_layers_is_left(stack: dict[str, dict[str, int]]) -> None:
    compiled_with = compiled(stack, dtype="float32").kvcompile
    assert compiled_with.inside is not None
    inside = compiled_with.inside.graph
    assert [*attends(inside)] == [2, 3]
    assert not [node for node in inside.nodes if ".layers.0." in str(node.target) or ".layers.1." in str(node.target)]
    lower = (ops.observe, ops.compress, ops.flush, ops.prefetch, ops.fetch, ops.to_host, block_ops.block_step)
    assert not [node for node in inside.nodes if node.target in lower]
    assert "model.model.block_embedder" not in {str(node.target) for node in inside.nodes}
    assert [node for node in inside.nodes if node.target is block_ops.wait]


def test_a_layer_in_the_step_of_the_other_decoder_is_a_bug() -> None:
    graph = compiled().kvcompile.graph.twin()
    other = dataclasses.replace(plan_of().blocks, split=3)
    with pytest.raises(KvcompileError, match="layer 2 must read the step of its own decoder"):
        InsertBlocks(dataclasses.replace(plan_of(), blocks=other)).ensures(graph)
