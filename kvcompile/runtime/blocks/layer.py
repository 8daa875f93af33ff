"""One layer of a token decoder: the entries of the current block of each sequence, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvcompile.plan.plan import LayerPlan
from kvcompile.runtime.layer import LayerCache
from kvcompile.stores import factory
from kvcompile.stores.base import Chosen
from kvcompile.stores.local import LocalStore

if TYPE_CHECKING:
    from kvcompile.runtime.cache import Step


class LocalLayer(LayerCache):
    """Keys and values of the current block, at most `places` a row. No backend is asked: a few entries need none."""

    def __init__(self, plan: LayerPlan, places: int) -> None:
        super().__init__(plan)
        self.places = places

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, valid: Tensor | None, headroom: int) -> None:
        """Write keys `[B, H_kv, W, D]` and values at their places `positions [B, W]` in the block."""
        if self.store is None:
            self.store = LocalStore.empty(keys, values, self.places)
            self.is_initialized = True
        self.store = self.store.append(keys, values, positions, headroom, valid)

    def attend(
        self, queries: Tensor, step: Step, layer: int, chosen: Chosen | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """Attention of the new queries `[B, H_q, W, D]` to the entries of their block before them, and their own."""
        store, cache = factory.local(self.held), step.cache
        if cache.reads is not None:
            cache.count_read(layer, store.nbytes())
        return store.attend(queries, step.positions, cache.plan.layers[layer].scale)
