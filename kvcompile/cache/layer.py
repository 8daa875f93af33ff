"""One layer's cache: a store in whatever layout its rows need, behind the interface that transformers expects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcompile.cache import plain
from kvcompile.cache.coded import CodedStore
from kvcompile.cache.paged import PagedStore
from kvcompile.cache.watch import Watch
from kvcompile.kernels.codecs import Encoder, encode
from kvcompile.plan import LayerPlan

Store = plain.PlainStore | CodedStore


class LayerCache(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one owner layer, and what its selection remembers.

    `store` is None until the first tokens arrive; it is dense while all rows have one length, ragged otherwise, paged
    where the plan says so, and coded where it stores older tokens in another format.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, plan: LayerPlan, encoder: Encoder = encode) -> None:
        super().__init__()
        self.plan, self.encoder = plan, encoder
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
            storage = self.plan.storage
            first = plain.opened(keys, values, valid, headroom, 0 if storage.coded else storage.page)
            self.store = CodedStore(storage, first, self.encoder) if storage.coded else first
            self.is_initialized = True
        if isinstance(self.store, CodedStore):
            self.store.append(keys, values, positions, headroom, valid)
        else:
            self.store = plain.added(self.store, keys, values, positions, valid, headroom)

    def keep(self, indices: list[Tensor], headroom: int) -> None:
        """Keep only the entries `indices[row]` (ascending) of each row; the rest is freed."""
        store = self.held
        if isinstance(store, CodedStore):
            store.keep(indices, headroom)
        else:
            self.store = plain.taken(store, indices, headroom)

    def rewrite(self, keys: list[Tensor]) -> None:
        """Replace the keys of every row by `keys[row] [n, D]`; they must not be encoded."""
        if isinstance(self.held, PagedStore):
            self.held.rewrite(keys)
            return
        for (old, _, _), new in zip(self.held.rows(), keys, strict=True):
            old.copy_(new)

    def settle(self, headroom: int, release: bool) -> bool:
        """Encode what is older than the residual (see `CodedStore.settle`); whether anything was."""
        return isinstance(self.store, CodedStore) and self.store.settle(headroom, release)

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences."""
        if self.store is not None:
            self.store.select(sequences.to(self.store.device))
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
