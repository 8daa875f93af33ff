"""Rows in the model's own dtype: dense while all have one length, ragged otherwise, or paged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcompile.kernels.compact import Compactor, compact
from kvcompile.stores.dense import DenseStore
from kvcompile.stores.paged import PagedStore
from kvcompile.stores.ragged import RaggedStore

PlainStore = DenseStore | RaggedStore | PagedStore
Row = tuple[Tensor, Tensor, Tensor]  # keys [n, D], values, positions


def opened(
    keys: Tensor, values: Tensor, valid: Tensor | None, headroom: int, page: int = 0, latent: int | None = None
) -> PlainStore:
    """An empty store for new tokens like `keys [B, H_kv, Q, D]` (those `valid [B, Q]`), with `headroom` behind them.

    page: in pages of so many tokens. latent: values are the channels of the keys from this one on.
    """
    batch, heads, count, _ = keys.shape
    if page:
        return PagedStore.empty(keys, values, page, latent)
    if valid is None:
        return DenseStore.empty(keys, values, count + headroom, latent)
    rooms = [int(n) + headroom for n in valid.sum(1) for _ in range(heads)]
    return RaggedStore(keys, values, batch, heads, rooms, latent)


def added(
    store: PlainStore,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    valid: Tensor | None,
    headroom: int,
    compactor: Compactor = compact,
) -> PlainStore:
    """The store with new tokens in it: itself, or a ragged one where padding makes rows differ."""
    if isinstance(store, PagedStore):
        store.append(keys, values, positions, headroom, valid, compactor)
        return store
    if valid is not None and isinstance(store, DenseStore):
        store = RaggedStore.of(store.rows(), store.batch, store.heads, headroom, store.latent)
    if isinstance(store, DenseStore):
        store.append(keys, values, positions, headroom)
    else:
        store.append(keys, values, positions, headroom, valid)
    return store


def taken(store: PlainStore, indices: list[Tensor], headroom: int, compactor: Compactor = compact) -> PlainStore:
    """A store with only the entries `indices[row]` of each row: a new one, but for pages."""
    if isinstance(store, PagedStore) or (isinstance(store, DenseStore) and len({i.numel() for i in indices}) == 1):
        return store.take(indices, headroom, compactor)
    return RaggedStore.kept(store, indices, headroom, compactor)


def of_rows(rows: list[Row], batch: int, heads: int, headroom: int) -> PlainStore:
    """A store of the given rows, dense if they have one length."""
    if len({len(p) for _, _, p in rows}) > 1:
        return RaggedStore.of(rows, batch, heads, headroom)
    keys, values, positions = (torch.unflatten(torch.stack(x), 0, (batch, heads)) for x in zip(*rows, strict=True))
    count = positions.shape[2]
    whole = torch.arange(count, device=keys.device, dtype=torch.int64)
    return DenseStore(keys, values, positions, count).take([whole] * len(rows), headroom)


def moved(store: PlainStore, move: Callable[[Tensor], Tensor]) -> PlainStore:
    """A store of the same entries whose every tensor is what `move` makes of the old one's; pages move by pool."""
    return store if isinstance(store, PagedStore) else store.moved(move)
