"""Looking into a compiled graph: what goes into each attention and what comes out, and the attentions alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.fx as fx

from kvcompile.errors import KvcompileError
from kvcompile.graph.wiring import attends
from kvcompile.runtime.live import LiveGraph


@dataclass(frozen=True)
class Tap:
    """The nodes of one layer's attention: hidden states that enter it, and what its output projection gives."""

    name: str
    entry: fx.Node
    exit: fx.Node


def taps(graph: fx.Graph) -> list[Tap]:
    """One tap a layer, in order. Raises KvcompileError where a layer has no output projection of its own."""
    by_layer = []
    for index, attend in sorted(attends(graph).items()):
        users = [node for node in attend.users if node.op == "call_module"]
        if len(attend.users) != 1 or not users:
            raise KvcompileError(f"layer {index}: attention must end in one projection", list(attend.users))
        name = str(users[0].target).rpartition(".")[0]
        entry = next(_inside(graph, name)).args[0]
        if not isinstance(entry, fx.Node):
            raise KvcompileError(f"layer {index}: attention must begin with a projection", entry)
        by_layer.append(Tap(name, entry, users[0]))
    return by_layer


def tapped(module: LiveGraph) -> LiveGraph:
    """The same graph with another output: (logits, hidden states into each attention, output of each attention)."""
    twin = module.twin()
    by_layer = taps(twin.graph)
    (end,) = (node for node in twin.graph.nodes if node.op == "output")
    end.args = ((end.args[0], tuple(t.entry for t in by_layer), tuple(t.exit for t in by_layer)),)
    twin.recompile()
    return twin


def attentions_alone(module: LiveGraph) -> LiveGraph:
    """The attentions of all layers, each on hidden states given for it; nothing else is computed.

    Takes one tuple of hidden states `[B, Q, hidden]` a layer after the graph's own arguments; returns a tuple of their
    outputs. A layer that reads another layer's keys and values reads those made of the hidden states given for that.
    """
    twin = module.twin()
    graph, by_layer = twin.graph, taps(twin.graph)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        states = graph.placeholder("states")
    after = states
    for index, tap in enumerate(by_layer):
        with graph.inserting_after(after):
            after = graph.call_function(_pick, (states, index))
        for node in list(_inside(graph, tap.name)):
            node.replace_input_with(tap.entry, after)
    (end,) = (node for node in graph.nodes if node.op == "output")
    end.args = (tuple(t.exit for t in by_layer),)
    graph.eliminate_dead_code()
    graph.lint()
    twin.recompile()
    return twin


def _pick(states: tuple[object, ...], index: int) -> object:
    return states[index]


def _inside(graph: fx.Graph, name: str) -> Iterator[fx.Node]:
    """Calls of the modules below `name`, in the order in which they run."""
    return (n for n in graph.nodes if n.op == "call_module" and str(n.target).startswith(f"{name}."))
