"""Which store a layer opens, and how kernels will read it once it is filled."""

from __future__ import annotations

from torch import Tensor

from kvcompile.kernels.codecs import Encoder, encode
from kvcompile.kernels.spec import Part, plain
from kvcompile.plan.storage import PLAIN, Storage
from kvcompile.stores.base import Store
from kvcompile.stores.dense import DenseStore
from kvcompile.stores.encoded.quantized import QuantizedStore
from kvcompile.stores.encoded.tiered import TieredStore
from kvcompile.stores.local import LocalStore
from kvcompile.stores.paged import PagedStore
from kvcompile.stores.ragged import RaggedStore


def opened(
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    headroom: int,
    storage: Storage = PLAIN,
    latent: int | None = None,
    encoder: Encoder = encode,
    layer: int = 0,
) -> Store:
    """An empty store for new tokens like `keys [B, H_kv, Q, D]` (those `valid [B, Q]`), with `headroom` behind them.

    Args:
        storage: the number formats of older tokens, and the tokens of a page.
        latent: values are the channels of the keys from this one on.
        encoder: what turns older tokens into codes.
        layer: whose store it is, for messages.
    """
    if storage.low is not None:
        return TieredStore(storage, contiguous(keys, values, valid, headroom, latent), encoder, layer)
    if storage.quantized:
        return QuantizedStore(storage, contiguous(keys, values, valid, headroom, latent), encoder, layer)
    if storage.page:
        return PagedStore.empty(keys, values, storage.page, latent)
    return contiguous(keys, values, valid, headroom, latent)


def tiered(store: Store) -> TieredStore:
    """A store that holds two tiers. Raises RuntimeError for one that holds one precision."""
    if not isinstance(store, TieredStore):
        raise RuntimeError("this store holds one precision")
    return store


def local(store: Store) -> LocalStore:
    """A store that holds the current block. Raises RuntimeError for one that holds more."""
    if not isinstance(store, LocalStore):
        raise RuntimeError("this store holds more than the current block")
    return store


def low(store: Store) -> list[int]:
    """Of the tokens that each row of a store holds, those in the low tier."""
    return store.low if isinstance(store, TieredStore) else [0] * len(store.lengths)


def in_order(store: Store) -> bool:
    """Whether kernels see the entries of a row in the order of their positions."""
    return not isinstance(store, TieredStore) or store.in_order


def contiguous(
    keys: Tensor, values: Tensor, valid: Tensor | None, headroom: int, latent: int | None = None
) -> DenseStore | RaggedStore:
    """An empty store whose rows are each one stretch of memory: dense, or ragged where padding makes lengths differ."""
    batch, heads, count, _ = keys.shape
    if valid is None:
        return DenseStore.empty(keys, values, count + headroom, latent)
    rooms = [int(n) + headroom for n in valid.sum(1) for _ in range(heads)]
    return RaggedStore(keys, values, batch, heads, rooms, latent)


def expected_parts(storage: Storage, layout: str, dtype: str) -> tuple[Part, ...]:
    """How rows of a layer lie once they are longer than the residual, where the residual is `layout`."""
    if not storage.quantized:
        return plain("paged", dtype, storage.page) if storage.page else plain(layout, dtype)
    if storage.low is not None:
        return (Part("ragged", *storage.low), Part("ragged", *storage.codecs(dtype)), *plain(layout, dtype))
    codes = Part("paged" if storage.page else "ragged", *storage.codecs(dtype), storage.page)
    return (codes, *plain(layout, dtype))


def chosen_parts(storage: Storage, dtype: str) -> tuple[Part, ...]:
    """How chosen entries of such rows lie."""
    ones = plain("paged", dtype, 1)
    return (Part("paged", *storage.codecs(dtype), storage.block), *ones) if storage.quantized else ones
