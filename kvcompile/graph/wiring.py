"""Reading a compiled graph: which layer reads whose keys and values, from the edges alone."""

from __future__ import annotations

import torch.fx as fx

from kvcompile.errors import KvcompileError
from kvcompile.graph import ops
from kvcompile.plan.plan import Plan


def _by_layer(graph: fx.Graph, op: object, place: int) -> dict[int, fx.Node]:
    return {int(n.args[place]): n for n in graph.nodes if n.target is op}


def appends(graph: fx.Graph) -> dict[int, fx.Node]:
    """`kv_append` nodes by layer."""
    return _by_layer(graph, ops.kv_append, 4)


def attends(graph: fx.Graph) -> dict[int, fx.Node]:
    """`attend` nodes by layer."""
    return _by_layer(graph, ops.attend, 3)


def observes(graph: fx.Graph) -> dict[int, fx.Node]:
    """`observe` nodes by layer."""
    return _by_layer(graph, ops.observe, 4)


def groupings(graph: fx.Graph) -> dict[int, fx.Node]:
    """`index` nodes by layer."""
    return _by_layer(graph, ops.index, 2)


def selections(graph: fx.Graph) -> dict[int, fx.Node]:
    """For each selected layer the node that drops its tokens."""
    selecting: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if node.target is ops.compress:
            selecting[int(node.args[3])] = node
        elif node.target is ops.allocate:
            selecting.update({int(i): node for i in node.args[1]})
    return selecting


def wiring(graph: fx.Graph) -> dict[int, int]:
    """{layer that attends: layer whose `kv_append` it reads}."""
    return {index: int(node.args[1].args[4]) for index, node in attends(graph).items()}  # type: ignore[union-attr, arg-type]


def outputs(graph: fx.Graph) -> dict[int, str]:
    """{layer: the module that projects what its attention has summed}."""
    return {
        index: str(user.target)
        for index, node in attends(graph).items()
        for user in node.users
        if user.op == "call_module"
    }


def verify(graph: fx.Graph, plan: Plan) -> dict[int, int]:
    """The wiring, if it is what the plan says.

    Raises KvcompileError naming the first layer that reads another layer's KV than planned.
    """
    owner_of = wiring(graph)
    for p in plan.layers:
        if owner_of.get(p.index) != p.owner:
            raise KvcompileError(
                f"layer {p.index} must read the KV of layer {p.owner}", f"layer {owner_of.get(p.index)} in the graph"
            )
    return owner_of
