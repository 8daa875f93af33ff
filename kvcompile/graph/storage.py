"""Passes of the storage policies: when old tokens are encoded."""

from __future__ import annotations

import torch.fx as fx

from kvcompile.errors import KvcompileError
from kvcompile.graph import ops
from kvcompile.graph.base import Pass, last_readers
from kvcompile.graph.wiring import appends
from kvcompile.plan import LayerPlan


class InsertSettling(Pass):
    """Each coded layer gets a `settle` node: after its selection, or after its last reader where it has none."""

    def _layers(self) -> list[LayerPlan]:
        return [p for p in self.plan.layers if p.storage.coded and p.owner == p.index]

    def wanted(self) -> bool:
        """Where some layer is coded."""
        return bool(self._layers())

    def run(self, module: fx.GraphModule) -> int:
        """Insert the nodes."""
        graph = module.graph
        stored, after = appends(graph), {**last_readers(graph), **selections(graph)}
        for p in self._layers():
            kv = stored[p.index]
            with graph.inserting_after(after[p.index]):
                graph.call_function(ops.settle, (kv, kv.args[3], p.index))
        return len(self._layers())

    def ensures(self, module: fx.GraphModule) -> None:
        """Every coded layer is settled exactly once, after all that read it exactly."""
        order = {node: i for i, node in enumerate(module.graph.nodes)}
        settled = {int(node.args[2]): node for node in order if node.target is ops.settle}
        if sorted(settled) != [p.index for p in self._layers()]:
            raise KvcompileError("every coded layer must be settled once", f"layers {sorted(settled)}")
        for before in (last_readers(module.graph), selections(module.graph)):
            for layer, node in settled.items():
                if layer in before and order[before[layer]] > order[node]:
                    raise KvcompileError(f"layer {layer} must be settled after its readers", str(before[layer]))


def selections(graph: fx.Graph) -> dict[int, fx.Node]:
    """For each selected layer the node that drops its tokens."""
    found: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if node.target is ops.compress:
            found[int(node.args[3])] = node
        elif node.target is ops.allocate:
            found.update({int(i): node for i in node.args[1]})
    return found
