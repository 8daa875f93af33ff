"""Passes of the storage policies: when old tokens are encoded, and what is rotated before."""

from __future__ import annotations

import torch.fx as fx

from kvcompile.errors import KvcompileError
from kvcompile.graph import ops
from kvcompile.graph.pass_base import Pass, last_readers
from kvcompile.graph.wiring import appends, attends, groupings, observes, selections
from kvcompile.plan.plan import LayerPlan


class InsertSettling(Pass):
    """Each quantized layer gets a `flush` node: after its selection, or after its last reader where it has none."""

    def _layers(self) -> list[LayerPlan]:
        return [p for p in self.plan.owners if p.storage.quantized]

    def wanted(self) -> bool:
        """Where some layer is quantized."""
        return bool(self._layers())

    def run(self, module: fx.GraphModule) -> int:
        """Insert the nodes."""
        graph = module.graph
        stored, after = appends(graph), {**last_readers(graph), **selections(graph), **groupings(graph)}
        for p in self._layers():
            kv = stored[p.index]
            with graph.inserting_after(after[p.index]):
                graph.call_function(ops.flush, (kv, kv.args[3], p.index))
        return len(self._layers())

    def ensures(self, module: fx.GraphModule) -> None:
        """Every quantized layer is flushed exactly once, after all that read it exactly."""
        order = {node: i for i, node in enumerate(module.graph.nodes)}
        flushed = {int(node.args[2]): node for node in order if node.target is ops.flush}
        if sorted(flushed) != [p.index for p in self._layers()]:
            raise KvcompileError("every quantized layer must be flushed once", f"layers {sorted(flushed)}")
        for before in (last_readers(module.graph), selections(module.graph), groupings(module.graph)):
            for layer, node in flushed.items():
                if layer in before and order[before[layer]] > order[node]:
                    raise KvcompileError(f"layer {layer} must be flushed after its readers", str(before[layer]))


class RotateHeads(Pass):
    """Queries and keys of rotated layers pass through a `hadamard` node, after their position embedding.

    What selections see of the queries is rotated like the keys; the moments of unrotated queries stay as they were.
    """

    def _readers(self) -> list[int]:
        return [p.index for p in self.plan.layers if self.plan.layers[p.owner].storage.rotated]

    def wanted(self) -> bool:
        """Where some layer is rotated."""
        return bool(self._readers())

    def run(self, module: fx.GraphModule) -> int:
        """Insert the nodes."""
        graph, readers = module.graph, self._readers()
        reading, stored = attends(graph), appends(graph)
        watching = {node.args[1] for node in observes(graph).values()}
        for index in readers:
            queries = _fed(reading[index], 0)
            turned = _turned(graph, queries)
            reading[index].update_arg(0, turned)
            for node in [n for n in queries.users if n.target is ops.together and n in watching]:
                node.replace_input_with(queries, turned)
            for node in [n for n in queries.users if n.target is ops.observe and n.args[1] is queries]:
                node.update_arg(1, turned)
            if index in stored:
                stored[index].update_arg(1, _turned(graph, _fed(stored[index], 1)))
        return len(readers)

    def ensures(self, module: fx.GraphModule) -> None:
        """Queries meet keys of the same basis."""
        for index, node in attends(module.graph).items():
            sides = [side.target is ops.hadamard for side in (_fed(node, 0), _fed(_fed(node, 1), 1))]
            if sides != [index in self._readers()] * 2:
                raise KvcompileError(f"layer {index}: queries and keys must both be rotated, or neither", str(sides))


def _fed(node: fx.Node, place: int) -> fx.Node:
    """The node that another reads as its argument number `place`."""
    source = node.args[place]
    if not isinstance(source, fx.Node):
        raise KvcompileError(f"{node} must read another node", f"{source!r} as argument {place}")
    return source


def _turned(graph: fx.Graph, states: fx.Node) -> fx.Node:
    with graph.inserting_after(states):
        return graph.call_function(ops.hadamard, (states,))
