"""What a rewriting pass is, and where in a graph the last reader of a layer's KV stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx

from kvcompile.graph.wiring import attends, wiring
from kvcompile.plan.plan import Plan


@dataclass(frozen=True)
class Pass:
    """One rewrite of the graph towards a plan."""

    plan: Plan

    def wanted(self) -> bool:
        """Whether the plan asks for this pass at all."""
        return True

    def run(self, module: fx.GraphModule) -> int:
        """Rewrite; return how many places changed."""
        raise NotImplementedError

    def ensures(self, module: fx.GraphModule) -> None:
        """Raise KvcompileError if the graph is not what the plan says."""


def last_readers(graph: fx.Graph) -> dict[int, fx.Node]:
    """For each owner layer the last `attend` node that reads its KV."""
    last: dict[int, fx.Node] = {}
    reads = wiring(graph)
    for index, node in attends(graph).items():
        last[reads[index]] = node
    return last
