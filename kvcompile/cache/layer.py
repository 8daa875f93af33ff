"""One layer's cache: a store in whatever layout its rows need, behind the interface that transformers expects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcompile.cache.dense import DenseStore
from kvcompile.cache.ragged import RaggedStore
from kvcompile.cache.watch import Watch
from kvcompile.plan import LayerPlan

Store = DenseStore | RaggedStore


class LayerCache(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one owner layer, and what its selection remembers.

    `store` is None until the first tokens arrive; it is dense while all rows have one length, ragged otherwise.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        self.plan = plan
        self.store: Store | None = None
        self.watch = Watch()
        self.columns = 0

    @property
    def held(self) -> Store:
        """The store, once there is one."""
        if self.store is None:
            raise RuntimeError(f"layer {self.plan.index} holds no tokens yet")
        return self.store

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, valid: Tensor | None, headroom: int) -> None:
        """Add new tokens: keys `[B, H_kv, Q, D]`, values, true positions `[B, Q]`; padding is not stored."""
        self.columns += keys.shape[2]
        if self.store is None:
            batch, heads, count, _ = keys.shape
            if valid is None:
                self.store = DenseStore.empty(keys, values, count + headroom)
            else:
                rooms = [int(n) + headroom for n in valid.sum(1) for _ in range(heads)]
                self.store = RaggedStore(keys, values, batch, heads, rooms)
            self.is_initialized = True
        if valid is not None and isinstance(self.store, DenseStore):
            self.store = RaggedStore.of(self.store.rows(), self.store.batch, self.store.heads, headroom)
        if isinstance(self.store, DenseStore):
            self.store.append(keys, values, positions, headroom)
        else:
            self.store.append(keys, values, positions, headroom, valid)

    def keep(self, indices: list[Tensor], headroom: int) -> None:
        """Keep only the entries `indices[row]` (ascending) of each row; the rest is freed."""
        store = self.held
        if len({i.numel() for i in indices}) == 1 and isinstance(store, DenseStore):
            self.store = store.take(indices, headroom)
            return
        rows = [(k[i], v[i], p[i]) for (k, v, p), i in zip(store.rows(), indices, strict=True)]
        self.store = RaggedStore.of(rows, store.batch, store.heads, headroom)

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences."""
        if self.store is not None:
            self.store.select(sequences.to(self.store.keys.device))
            self.watch.select(sequences)

    def reset(self) -> None:
        """Forget everything."""
        self.store, self.watch, self.columns, self.is_initialized = None, Watch(), 0, False

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: what transformers slices new inputs by."""
        return self.columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of the mask transformers would build; the compiled graph builds none."""
        return self.columns + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: `append` makes the store."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: the compiled graph calls `append`."""
        raise NotImplementedError("a kvcompile cache is written by a compiled model only")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search picks sequences."""
        self.select(beam_idx)
