"""Stretches of a compiled graph as graphs of their own: between the embeddings, any two layers, and the last norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from kvcompile.heal.taps import taps
from kvcompile.runtime.live import LiveGraph, with_states


@dataclass(frozen=True)
class Sections:
    """A causal LM in four parts; each takes a graph's own arguments, states `[B, Q, hidden]` first but for `embed`.

    embed: token ids to what enters the first layer. lower: that to what enters layer `split`. upper: that to
    `(what leaves the last layer, what enters the attention of each of these layers)`. head: that to logits.
    """

    embed: LiveGraph
    lower: LiveGraph
    upper: LiveGraph
    head: LiveGraph


def sections(graph: LiveGraph, split: int) -> Sections:
    """The parts of the graph of one forward pass, over the same modules."""
    ends: Any = _end(with_states(graph)).args[0]
    *states, normed = (str(node.name) for node in ends[1])
    (last,) = (str(node.args[0].name) for node in graph.graph.nodes if node.name == normed)
    entries = [tap.entry.name for tap in taps(graph.graph)][split:]
    return Sections(
        embed=_between(graph, None, states[0]),
        lower=_between(graph, states[0], states[split]),
        upper=_between(graph, states[split], last, entries),
        head=_between(graph, last, None),
    )


def _between(graph: LiveGraph, start: str | None, stop: str | None, beside: Sequence[str] = ()) -> LiveGraph:
    """From the value called `start` (None: token ids) to that called `stop` (None: logits), others `beside` it.

    Whatever the result does not need is gone, also calls with a side effect: those of other layers on the cache.
    """
    twin = graph.twin()
    nodes = {node.name: node for node in twin.graph.nodes}
    end = _end(twin)
    result = nodes[stop] if stop else end.args[0]
    if start is not None:
        given = next(iter(twin.graph.nodes))
        (embedded,) = (node for node in given.users if node.op == "call_module")
        embedded.replace_all_uses_with(given)  # beside layers, position embeddings ask it for device and dtype
        nodes[start].replace_all_uses_with(given)
    end.args = ((result, tuple(nodes[name] for name in beside)) if beside else result,)
    needed = _ancestors(end)
    for node in reversed(list(twin.graph.nodes)):
        if node not in needed and node.op != "placeholder":
            twin.graph.erase_node(node)
    twin.graph.lint()
    twin.recompile()
    return twin


def _ancestors(node: fx.Node) -> set[fx.Node]:
    reached, unvisited = {node}, [node]
    while unvisited:
        for source in unvisited.pop().all_input_nodes:
            if source not in reached:
                reached.add(source)
                unvisited.append(source)
    return reached


def _end(graph: LiveGraph) -> fx.Node:
    end: fx.Node = next(node for node in graph.graph.nodes if node.op == "output")
    return end
