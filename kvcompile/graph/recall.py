"""The pass of the recall policies: when a layer's entries are grouped, and where a step chooses among them."""

from __future__ import annotations

import torch.fx as fx

from kvcompile.errors import KvcompileError
from kvcompile.graph import ops
from kvcompile.graph.pass_base import Pass, last_readers
from kvcompile.graph.wiring import appends, attends, groupings, selections, wiring


class InsertRecall(Pass):
    """Each `attend` to a layer with a recall reads what a `recall` node before it chooses by the same queries.

    An `index` node groups the layer's entries: after its selection, or after its last reader where it has none.
    """

    def _owners(self) -> list[int]:
        return [p.index for p in self.plan.owners if p.recall is not None]

    def wanted(self) -> bool:
        """Where some layer has a recall."""
        return bool(self._owners())

    def run(self, module: fx.GraphModule) -> int:
        """Insert the nodes."""
        graph, owners = module.graph, self._owners()
        stored, after = appends(graph), {**last_readers(graph), **selections(graph)}
        reads = wiring(graph)
        for index, node in attends(graph).items():
            if reads[index] in owners:
                with graph.inserting_before(node):
                    chosen = graph.call_function(ops.recall, node.args[:4])
                node.update_kwarg("chosen", chosen)
        for index in owners:
            kv = stored[index]
            with graph.inserting_after(after[index]):
                graph.call_function(ops.index, (kv, kv.args[3], index))
        return len(owners)

    def ensures(self, module: fx.GraphModule) -> None:
        """Readers of a layer with a recall choose by their own queries, and it is grouped once, after them."""
        graph, owners = module.graph, self._owners()
        order = {node: i for i, node in enumerate(graph.nodes)}
        reads = wiring(graph)
        for index, node in attends(graph).items():
            chosen = node.kwargs.get("chosen")
            by = chosen.args if isinstance(chosen, fx.Node) and chosen.target is ops.recall else None
            if (by == node.args[:4]) != (reads[index] in owners):
                raise KvcompileError(f"layer {index} must attend to what its own queries choose", str(chosen))
        grouped = groupings(graph)
        if sorted(grouped) != owners:
            raise KvcompileError("every layer with a recall must be grouped once", f"layers {sorted(grouped)}")
        for before in (last_readers(graph), selections(graph)):
            for layer, node in grouped.items():
                if layer in before and order[before[layer]] > order[node]:
                    raise KvcompileError(f"layer {layer} must be grouped after its readers", str(before[layer]))
