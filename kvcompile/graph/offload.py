"""The pass of the policy that offloads: when a layer's store comes to the device, and when it leaves."""

from __future__ import annotations

import torch.fx as fx

from kvcompile.errors import KvcompileError
from kvcompile.graph import ops
from kvcompile.graph.pass_base import Pass
from kvcompile.graph.wiring import appends


class InsertOffload(Pass):
    """Each offloaded layer gets a `fetch` before its append and a `to_host` after all that use its store.

    Its `prefetch` stands after the `fetch` of the offloaded layer before it (of the first: where the pass begins), so
    that two are on the device at a time. What layers that share a budget do at their one `allocate`, and after, brings
    a parked store itself where something is due: else all of them would wait for it on the device.
    """

    def _layers(self, graph: fx.Graph) -> list[int]:
        return [i for i in appends(graph) if self.plan.layers[i].storage.offload]

    def wanted(self) -> bool:
        """Where some layer is offloaded."""
        return any(p.storage.offload for p in self.plan.layers)

    def run(self, module: fx.GraphModule) -> int:
        """Insert the nodes."""
        graph = module.graph
        stored, last = appends(graph), last_users(graph)
        before = None
        for i in self._layers(graph):
            step = stored[i].args[3]
            if not isinstance(step, fx.Node):
                raise KvcompileError(f"layer {i}: an append belongs to a pass", repr(step))
            with graph.inserting_before(stored[i]):
                fetched = graph.call_function(ops.fetch, (step, i))
            with graph.inserting_after(before or step):
                graph.call_function(ops.prefetch, (step, i))
            with graph.inserting_after(last[i]):
                graph.call_function(ops.to_host, (step, i))
            before = fetched
        return len(self._layers(graph))

    def ensures(self, module: fx.GraphModule) -> None:
        """Every offloaded layer is prefetched, fetched, used and parked in this order, once, and no other is."""
        graph = module.graph
        order = {node: i for i, node in enumerate(graph.nodes)}
        stored, last = appends(graph), last_users(graph)
        moves: dict[int, list[fx.Node]] = {}
        for node in order:
            if node.target in (ops.prefetch, ops.fetch, ops.to_host):
                moves.setdefault(int(node.args[1]), []).append(node)
        if sorted(moves) != sorted(self._layers(graph)):
            raise KvcompileError("every offloaded layer must be fetched and parked", f"layers {sorted(moves)}")
        for i, nodes in moves.items():
            targets = [node.target for node in nodes]
            if targets != [ops.prefetch, ops.fetch, ops.to_host]:
                raise KvcompileError(f"layer {i} must be prefetched, fetched and parked once", str(nodes))
            if order[nodes[1]] > order[stored[i]] or order[nodes[2]] < order[last[i]]:
                raise KvcompileError(f"layer {i} must be on the device from its append to {last[i]}", str(nodes))


def last_users(graph: fx.Graph) -> dict[int, fx.Node]:
    """For each owner layer the last node that needs its store on the device: none after an `allocate`."""
    late = {int(i) for node in graph.nodes if node.target is ops.allocate for i in node.args[1]}
    order = {node: place for place, node in enumerate(graph.nodes)}
    last: dict[int, fx.Node] = {}
    for index, kv in appends(graph).items():
        users = [n for n in kv.users if not (n.target is ops.flush and index in late)]
        last[index] = max(users, key=order.__getitem__)
    return last
