"""Rewriting passes: requires -> run -> ensures; each says what it changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.fx as fx

from kvcompile.errors import BUG, KvcompileError
from kvcompile.graph import ops
from kvcompile.graph.blocks import CloseBlocks, InsertBlocks
from kvcompile.graph.offload import InsertOffload
from kvcompile.graph.pass_base import Pass, last_readers
from kvcompile.graph.quantize import InsertSettling, RotateHeads
from kvcompile.graph.recall import InsertRecall
from kvcompile.graph.share import ShareKV
from kvcompile.graph.wiring import appends, observes
from kvcompile.plan.plan import LayerPlan, Plan


class DropObservers(Pass):
    """Layers without a selection need no `observe` node."""

    def wanted(self) -> bool:
        """Where some owner has no selection (readers of another layer's KV have lost their observers before)."""
        return len(self.plan.selected) < len(self.plan.owners)

    def run(self, module: fx.GraphModule) -> int:
        """Erase the nodes."""
        chosen = {p.index for p in self.plan.selected}
        nodes = [node for index, node in observes(module.graph).items() if index not in chosen]
        for node in nodes:
            module.graph.erase_node(node)
        return len(nodes)


class InsertCompression(Pass):
    """Each selected layer gets a `compress` node after its last reader; layers that share a budget, one `allocate`.

    `observe` comes before it and after the layer's attention: what entries received is known then.
    """

    def wanted(self) -> bool:
        """Where the plan drops anything."""
        return bool(self.plan.selected)

    def run(self, module: fx.GraphModule) -> int:
        """Insert the nodes."""
        graph = module.graph
        watched, readers = observes(graph), last_readers(graph)
        for indices in self.plan.budgets:
            selection, own = self.plan.layers[indices[0]].selection, watched[indices[0]]
            with graph.inserting_after(max(node for i in indices for node in (readers[i], watched[i]))):
                if selection is not None and selection.allocation.traits.cross_layer:
                    graph.call_function(ops.allocate, (own.args[3], indices, *(watched[i] for i in indices)))
                else:
                    graph.call_function(ops.compress, (own.args[0], own, own.args[3], indices[0]))
        return len(self.plan.selected)

    def ensures(self, module: fx.GraphModule) -> None:
        """Every selected layer is compressed exactly once."""
        done: list[int] = []
        for node in module.graph.nodes:
            if node.target is ops.compress:
                done.append(node.args[3])
            elif node.target is ops.allocate:
                done.extend(node.args[1])
        if sorted(done) != [p.index for p in self.plan.selected]:
            raise KvcompileError("every selected layer must be compressed once", f"layers {sorted(done)}")


class TrimSliding(Pass):
    """Sliding layers without a selection free what has left their window."""

    def _layers(self) -> list[LayerPlan]:
        return [p for p in self.plan.owners if p.sliding_window and p.selection is None]

    def wanted(self) -> bool:
        """Where such a layer exists."""
        return bool(self._layers())

    def run(self, module: fx.GraphModule) -> int:
        """Insert a `trim` node after the layer's last reader."""
        graph = module.graph
        stored, readers = appends(graph), last_readers(graph)
        for p in self._layers():
            kv = stored[p.index]
            with graph.inserting_after(readers[p.index]):
                graph.call_function(ops.trim, (kv, kv.args[3], p.index))
        return len(self._layers())


@dataclass
class Rewritten:
    """What the passes did, for the report: pass name -> places changed."""

    changes: dict[str, int] = field(default_factory=dict)


PASSES: tuple[type[Pass], ...] = (
    InsertBlocks,
    ShareKV,
    DropObservers,
    InsertCompression,
    TrimSliding,
    RotateHeads,
    InsertRecall,
    InsertSettling,
    InsertOffload,
    CloseBlocks,
)


def rewrite(module: fx.GraphModule, plan: Plan, passes: Sequence[type[Pass]] | None = None) -> Rewritten:
    """Run the passes that `plan` asks for, in order, in place.

    Raises KvcompileError, naming the pass and those before it, where one matches nothing or fails its own check.
    """
    report = Rewritten()
    for kind in passes or PASSES:
        step = kind(plan)
        if not step.wanted():
            continue
        name = kind.__name__
        try:
            changed = step.run(module)
            if not changed:
                modules = sorted({str(n.target) for n in module.graph.nodes if n.op == "call_module"})[:8]
                raise KvcompileError("a pass must change something", f"no place among modules {modules}")
            module.graph.lint()
            step.ensures(module)
        except KvcompileError as error:
            raise KvcompileError(
                f"pass {name} (after {list(report.changes) or 'none'}): {error.rule}", error.got, error.fix or BUG
            ) from error
        report.changes[name] = changed
    module.graph.eliminate_dead_code()
    module.recompile()
    return report
