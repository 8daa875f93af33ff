"""Cross-layer sharing as edges: a reader's `attend` takes its owner's `kv_append`, and what fed its own goes."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from kvcompile.errors import KvcompileError
from kvcompile.graph import ops
from kvcompile.graph.pass_base import Pass, last_readers
from kvcompile.graph.wiring import appends, attends, observes, verify
from kvcompile.plan.plan import LayerPlan


class ShareKV(Pass):
    """Layers that read another layer's keys and values lose their own: projections, rotation, append and observer.

    Their own queries, rotated at the same positions, meet the owner's keys. A selection of the owner looks at the
    queries of all its readers, which then stand in the groups of its KV heads: `observe` moves behind the last
    reader's `attend`.
    """

    def wanted(self) -> bool:
        """Where some layer does not own its cache."""
        return bool(self._readers())

    def _readers(self) -> list[LayerPlan]:
        return [p for p in self.plan.layers if p.owner != p.index]

    def run(self, module: fx.GraphModule) -> int:
        """Rewire; dead code goes with the edges."""
        graph = module.graph
        stored, reading, watched = appends(graph), attends(graph), observes(graph)
        for p in self._readers():
            reading[p.index].update_arg(1, stored[p.owner])
        for index in {p.owner for p in self._readers()}:
            if self.plan.layers[index].selection is not None:
                self._observe_all(graph, index, watched)
        for p in self._readers():
            graph.erase_node(watched[p.index])
            graph.erase_node(stored[p.index])
        graph.eliminate_dead_code()
        return len(self._readers())

    def _observe_all(self, graph: fx.Graph, owner: int, watched: dict[int, fx.Node]) -> None:
        """One `observe` for the queries of all readers of a layer."""
        own = watched[owner]
        readers = [watched[p.index] for p in self.plan.layers if p.owner == owner]
        kv, step = own.args[0], own.args[3]
        with graph.inserting_before(last_readers(graph)[owner].next):
            rotated, plain = (
                graph.call_function(ops.together, (kv, *(node.args[place] for node in readers))) for place in (1, 2)
            )
            sinks: dict[str, Any] = {}
            if "sinks" in own.kwargs:
                sinks["sinks"] = graph.call_function(
                    ops.sinks_together, (kv, *(node.kwargs["sinks"] for node in readers))
                )
            graph.call_function(ops.observe, (kv, rotated, plain, step, owner), sinks)
        graph.erase_node(own)

    def ensures(self, module: fx.GraphModule) -> None:
        """Only owners append, and every layer reads the KV that the plan says."""
        verify(module.graph, self.plan)
        owners = {p.index for p in self.plan.owners}
        if set(appends(module.graph)) != owners:
            raise KvcompileError("only owners store keys and values", f"layers {sorted(appends(module.graph))}")
