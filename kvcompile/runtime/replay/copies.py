"""A cache of one sequence for what nobody keeps: plain numbers, in which every query is remembered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kvcompile.plan.plan import LayerPlan
from kvcompile.plan.selection import Needs, Schedule, Score, Selection
from kvcompile.plan.storage import PLAIN
from kvcompile.runtime.cache import KVCache
from kvcompile.stores.base import Store
from kvcompile.stores.dense import DenseStore
from kvcompile.stores.ragged import RaggedStore

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class Recorder(Score):
    """Has all queries remembered."""

    needs = Needs(queries=None)

    def score(self, seen: Observation) -> Tensor:
        """Zeros."""
        return torch.zeros(seen.keys.shape[:2], dtype=torch.float32, device=seen.keys.device)


def copy_of(cache: KVCache, b: int) -> KVCache:
    """A cache of what sequence b of another holds, decoded where it is encoded, in memory of its own once it grows."""
    copy = KVCache(cache.plan.map(_recording), cache.rotaries, cache.backend)
    copy.seen = [cache.seen[b]]
    for own, layer in zip(copy.layers, cache.layers, strict=True):
        if layer.store is not None:
            with layer.at_hand() as store:
                own.store = _sequence(store, b, own.plan)
            own.columns, own.is_initialized = cache.seen[b], True
    return copy


def _recording(p: LayerPlan) -> LayerPlan:
    """The layer in plain numbers, with a selection that drops nothing: one with a window keeps what leaves it, too."""
    recorder = Selection("replay", Recorder(), None, schedule=Schedule(between_chunks=False))
    selection = recorder if p.owner == p.index else None
    return replace(p, selection=selection, storage=replace(PLAIN, rotated=p.storage.rotated))


def _sequence(store: Store, b: int, p: LayerPlan) -> Store:
    """The rows of one sequence; a full store, so that the next token does not go into the memory of the other."""
    latent = p.latent.rope if p.latent else None
    keys, values, positions, lengths = store.sequence(b)
    if len(set(lengths)) == 1:
        return DenseStore(keys.unsqueeze(0), values.unsqueeze(0), positions.unsqueeze(0), lengths[0], latent)
    rows = [(k[:n], v[:n], at[:n]) for k, v, at, n in zip(keys, values, positions, lengths, strict=True)]
    return RaggedStore.of(rows, 1, store.heads, 0, latent)


__all__ = ["Recorder", "copy_of"]
