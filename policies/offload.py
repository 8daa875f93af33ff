"""Offload: layers whose keys and values lie in host memory until their own attention needs them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.plan import Family, LayerPlan, Plan
from kvcompile.policies.base import Policy, require_layers


@dataclass(frozen=True)
class Offload(Policy):
    """Stores of chosen layers in host memory between their uses (as FlexGen, arXiv 2303.06865).

    The accelerator holds the layers that stay and at most two others: the one that attends and the next, which comes
    meanwhile (CUDA: pinned memory, a stream of its own). Resident layers first hide the first one's way. While only
    tokens are appended nothing but these goes back; of pages, those that were written. `KVCache.resident()` and
    `KVCache.in_host_memory()` say what lies where. On a CPU device and host are one memory: the same moves are made and
    counted, which saves nothing there. It has been run that way only, never on a GPU: stream, events and pinned memory
    are untested, and no speed is known.

    keep: so many first layers stay. layers: those that are offloaded (default: all but `keep`). skip_layers: layers
    left as they are.
    """

    name: ClassVar[str] = "offload"
    family: ClassVar[Family] = "storage"
    summary: ClassVar[str] = "host memory for the layers that are not attending just now"
    keep: int = 0
    layers: list[int] | None = None
    skip_layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.require(self.keep >= 0, "keep", "0 or more")
        self.require(not (self.keep and self.layers is not None), "keep", "0 where layers says which are offloaded")

    def store(self, p: LayerPlan) -> LayerPlan:
        """In host memory."""
        return replace(p, storage=replace(p.storage, offload=True))

    def apply(self, plan: Plan) -> Plan:
        """The chosen layers with a cache of their own, sliding layers too. Raises KvcompileError where none is left."""
        plan = plan.record(self.name, self.family)
        require_layers(plan, self.name, self.skip_layers)
        count = len(plan.layers)
        if self.layers is not None and not all(0 <= i < count for i in self.layers):
            raise KvcompileError(f"stack.{self.name}: layers must be in 0..{count - 1}", self.layers)
        chosen = range(self.keep, count) if self.layers is None else self.layers
        owners = [p.index for p in plan.layers if p.owner == p.index]
        mine = [i for i in owners if i in chosen and i not in self.skip_layers]
        if not mine:
            raise KvcompileError(
                f"{self.name}: some layer must be offloaded",
                f"none of {len(owners)} layers with a cache: keep={self.keep}, {len(self.skip_layers)} skipped",
                f"drop {self.name} from the stack",
            )
        return plan.map(self.store, mine)
