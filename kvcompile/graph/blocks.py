"""The pass of a block transformer: lower layers over blocks, upper ones over the tokens of one block."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from kvcompile.errors import KvcompileError
from kvcompile.graph import block_ops, ops
from kvcompile.graph.pass_base import Pass, last_readers
from kvcompile.graph.wiring import appends
from kvcompile.plan.blocks import Blocks
from kvcompile.runtime.live import LiveGraph

# modules of the base model, as `structure.blocks` names them
EMBEDDER, EXPANSION, START, BOS = "block_embedder", "block_expansion", "block_start", "block_bos"


class InsertBlocks(Pass):
    """Between embeddings and layers a `block_tokens` node; between the decoders a `token_inputs` node.

    Each decoder has its own step, rotary embedding and inputs. Only wanted logits, and the current block of each
    sequence, go through the upper layers, each of which ends with a `close` node.
    """

    @property
    def _blocks(self) -> Blocks:
        if self.plan.blocks is None:
            raise KvcompileError("only the plan of a block transformer has blocks", "none")
        return self.plan.blocks

    def wanted(self) -> bool:
        """Where the plan has blocks."""
        return self.plan.blocks is not None

    def run(self, module: fx.GraphModule) -> int:
        """Insert the nodes; every layer reads from its own decoder."""
        graph, nodes = module.graph, list(module.graph.nodes)
        ids, keep = nodes[0], _placeholder(graph, "logits_to_keep")
        step = _only(graph, ops.begin)
        rotary = _rotary(graph)
        base = str(rotary.target).rpartition(".")[0]
        first, upper = (nodes.index(_first_call(nodes, f"{base}.layers.{i}.")) for i in (0, self._blocks.split))
        embedded, between = nodes[first].args[0], nodes[upper].args[0]
        with graph.inserting_before(nodes[first]):
            lookup = self._blocks.embedder == "lookup"
            features = graph.call_module(f"{base}.{EMBEDDER}", (ids,)) if lookup else embedded
            blocks = graph.call_function(block_ops.block_step, (step,))
            vectors = graph.call_function(block_ops.block_tokens, (features, step, blocks))
            vectors = vectors if lookup else graph.call_module(f"{base}.{EMBEDDER}", (vectors,))
            angles = _angles(graph, rotary, vectors, blocks)
        _rewire(nodes[first:upper], {embedded: vectors, step: blocks, rotary: angles})
        with graph.inserting_before(nodes[upper]):
            graph.call_function(block_ops.wait, (features, step))
            tokens = graph.call_function(block_ops.token_step, (step, keep))
            start, bos = (graph.get_attr(f"{base}.{name}") for name in (START, BOS))
            before = graph.call_function(block_ops.contexts, (start, between, tokens))
            prefixes = graph.call_module(f"{base}.{EXPANSION}", (before,))
            inputs = graph.call_function(block_ops.token_inputs, (prefixes, bos, embedded, tokens))
            angles = _angles(graph, rotary, inputs, tokens)
        _rewire(nodes[upper:], {between: inputs, step: tokens, rotary: angles})
        for node in [node for node in nodes[upper:] if node.op == "call_function" and keep in node.all_input_nodes]:
            with graph.inserting_before(node):
                chosen = graph.call_function(block_ops.wanted_outputs, (node.args[0], tokens))
            node.replace_all_uses_with(chosen)
        graph.eliminate_dead_code()
        return len(self.plan.layers)

    def ensures(self, module: fx.GraphModule) -> None:
        """Lower layers append in the step of the blocks, upper ones in that of the tokens, which gives the logits."""
        graph = module.graph
        blocks, tokens = _only(graph, block_ops.block_step), _only(graph, block_ops.token_step)
        for index, node in appends(graph).items():
            if node.args[3] is not (blocks if index < self._blocks.split else tokens):
                raise KvcompileError(f"layer {index} must read the step of its own decoder", str(node.args[3]))
        _only(graph, block_ops.wanted_outputs)


class CloseBlocks(Pass):
    """Each layer of the token decoder keeps the current blocks alone: a `close` node after its last reader."""

    def wanted(self) -> bool:
        """Where the plan has blocks."""
        return self.plan.blocks is not None

    def run(self, module: fx.GraphModule) -> int:
        """Insert the nodes."""
        graph, split = module.graph, self.plan.blocks.split if self.plan.blocks else 0
        stored = {index: kv for index, kv in appends(graph).items() if index >= split}
        after = last_readers(graph)
        for index, kv in stored.items():
            with graph.inserting_after(after[index]):
                graph.call_function(block_ops.close, (kv, kv.args[3], index))
        return len(stored)


def inside_blocks(graph: LiveGraph) -> LiveGraph:
    """The graph of a pass in which no block is completed: without the block decoder, which has nothing to read."""
    inside = graph.twin()
    step, before = _only(inside.graph, block_ops.block_step), _only(inside.graph, block_ops.contexts)
    before.update_arg(1, None)
    decoder = {step}
    for node in inside.graph.nodes:  # in order: what reads a node comes after it
        if any(source in decoder for source in node.all_input_nodes):
            decoder.add(node)
    for node in reversed(list(inside.graph.nodes)):
        if node in decoder:
            inside.graph.erase_node(node)
    inside.graph.lint()
    inside.recompile()
    return inside


def _rewire(nodes: list[fx.Node], sources: dict[Any, fx.Node]) -> None:
    """Let nodes read other sources."""
    for node in nodes:
        for old, new in sources.items():
            if node is not new:
                node.replace_input_with(old, new)


def _angles(graph: fx.Graph, rotary: fx.Node, states: fx.Node, step: fx.Node) -> fx.Node:
    at = graph.call_function(block_ops.positions, (step,))
    old = _placeholder(graph, "position_ids")
    return graph.node_copy(rotary, lambda node: at if node is old else states)


def _rotary(graph: fx.Graph) -> fx.Node:
    """The one call of the rotary embedding, which reads hidden states (for their dtype) and positions."""
    calls = [node for node in _placeholder(graph, "position_ids").users if node.op == "call_module"]
    if len(calls) != 1:
        raise KvcompileError("the layers of a block transformer turn by one rotary embedding", f"{len(calls)} of them")
    return calls[0]


def _first_call(nodes: list[fx.Node], inside: str) -> fx.Node:
    return next(node for node in nodes if node.op == "call_module" and str(node.target).startswith(inside))


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    nodes: list[fx.Node] = [node for node in graph.nodes if node.op == "placeholder" and node.target == name]
    return nodes[0]


def _only(graph: fx.Graph, op: object) -> fx.Node:
    nodes: list[fx.Node] = [node for node in graph.nodes if node.target is op]
    if len(nodes) != 1:
        raise KvcompileError(f"a graph has one node {getattr(op, '__name__', op)}", f"{len(nodes)}")
    return nodes[0]
