"""Offload: layers whose keys and values lie in host memory until their own attention needs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.policies.quantized import StoragePolicy


@dataclass(frozen=True)
class Offload(StoragePolicy):
    """Stores of chosen layers in host memory between their uses (as FlexGen, arXiv 2303.06865).

    The accelerator holds the layers that stay and at most two others: the one that attends and the next, which comes
    meanwhile (CUDA: pinned memory, a stream of its own). Resident layers first hide the first one's way. While only
    tokens are appended nothing but these goes back; of pages, those that were written. Layers with a recall (quest)
    stay where they are while tokens are decoded: what a step chose comes, and new tokens go. `KVCache.resident()` and
    `KVCache.in_host_memory()` say what lies where. On a CPU device and host are one memory: the same moves are made and
    counted, which saves nothing there. It has been run that way only, never on a GPU: stream, events and pinned memory
    are untested, and no speed is known.

    keep: so many first layers stay. layers: those that are offloaded (default: all but `keep`).
    """

    name: ClassVar[str] = "offload"
    wants: ClassVar[str] = "be offloaded"
    summary: ClassVar[str] = "host memory for the layers that are not attending just now"
    keep: int = 0
    layers: list[int] | None = None

    def __post_init__(self) -> None:
        self.require(self.keep >= 0, "keep", "0 or more")
        self.require(not (self.keep and self.layers is not None), "keep", "0 where layers says which are offloaded")

    def store(self, p: LayerPlan) -> LayerPlan:
        """In host memory."""
        return replace(p, storage=replace(p.storage, offload=True))

    def fits(self, p: LayerPlan) -> bool:
        """Whether it is one of the chosen, sliding layers too."""
        return p.index >= self.keep if self.layers is None else p.index in self.layers

    def apply(self, plan: Plan) -> Plan:
        """The chosen layers with a cache of their own. Raises KvcompileError where none is left."""
        count = len(plan.layers)
        if self.layers is not None and not all(0 <= i < count for i in self.layers):
            raise KvcompileError(f"stack.{self.name}: layers must be in 0..{count - 1}", self.layers)
        return super().apply(plan)
