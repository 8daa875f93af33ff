"""The dense layout: every row of a layer holds the same number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcompile.kernels.choose import Places
from kvcompile.kernels.compact import Arrays, Compactor, compact
from kvcompile.kernels.layout import DenseView, PagedView
from kvcompile.kernels.spec import Part, plain
from kvcompile.stores import hugepages
from kvcompile.stores.base import POSITION_TYPE, Chosen, Orders, Row, Stacked, scattered, tabled
from kvcompile.stores.ragged import RaggedStore


class DenseStore(Stacked):
    """Keys `[B, H_kv, capacity, D]`, values, true positions `[B, H_kv or 1, capacity]`, one length for all rows.

    Appending writes into room kept at the end; a full store grows by `headroom` tokens, so that a token costs a
    copy of its own keys only. `latent`: values are the channels of the keys from this one on, and have no memory.
    Where padding or a selection makes lengths differ, it becomes a ragged store.
    """

    def __init__(
        self, keys: Tensor, values: Tensor | None, positions: Tensor, length: int, latent: int | None = None
    ) -> None:
        self.keys, self.positions, self.length, self.latent = keys, positions, length, latent
        self._values = values if latent is None else None
        self._places: Places | None = None

    @classmethod
    def empty(cls, keys: Tensor, values: Tensor, room: int, latent: int | None = None) -> DenseStore:
        """A store shaped for new tokens like `keys [B, H_kv, Q, D]` with room for `room` of them."""
        batch, heads, _, dim = keys.shape
        return cls(
            hugepages.empty(keys, batch, heads, room, dim),
            hugepages.empty(values, batch, heads, room, values.shape[-1]) if latent is None else None,
            torch.empty(batch, 1, room, dtype=POSITION_TYPE, device=keys.device),
            0,
            latent,
        )

    @property
    def values(self) -> Tensor:
        """Values `[B, H_kv, capacity, D_v]`."""
        return self.keys[..., self.latent :] if self._values is None else self._values

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each row (sequence-major)."""
        return [self.length] * (self.batch * self.heads)

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        headroom: int,
        valid: Tensor | None = None,
        compactor: Compactor = compact,
    ) -> DenseStore | RaggedStore:
        """Add `keys [B, H_kv, Q, D]`, `values`, at true `positions [B, Q]`; ragged where only some are `valid`."""
        if valid is not None:
            ragged = RaggedStore.of(self.rows(), self.batch, self.heads, headroom, self.latent)
            return ragged.append(keys, values, positions, headroom, valid)
        start, stop = self.length, self.length + keys.shape[2]
        if stop > self.keys.shape[2]:
            self._grow(stop + headroom)
        self.keys[:, :, start:stop] = keys
        if self._values is not None:
            self._values[:, :, start:stop] = values
        self.positions[:, :, start:stop] = positions.unsqueeze(1)
        self.length = stop
        return self

    def _grow(self, capacity: int) -> None:
        def grown(old: Tensor) -> Tensor:
            new = hugepages.empty(old, *old.shape[:2], capacity, *old.shape[3:])
            new[:, :, : self.length] = old[:, :, : self.length]
            return new

        self._change(grown)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put changed tensors in place of all that are held."""
        self._places = None
        self.keys, self.positions = change(self.keys), change(self.positions)
        self._values = None if self._values is None else change(self._values)

    def view(self, chosen: Chosen | None = None) -> DenseView | PagedView:
        """What a kernel reads: all entries, or those `chosen`.

        The first choice gives each head positions of its own, as kernels read those of a chosen entry beside its key.
        """
        if chosen is None:
            n = self.length
            return DenseView(self.keys[:, :, :n], self.values[:, :, :n], self.positions[:, :, :n])
        self._own_positions()
        table = tabled(chosen, self.device)
        keys, values, positions = (torch.flatten(x, 0, 2) for x in (self.keys, self.values, self.positions))
        return scattered((keys, values, positions), self.places, table, self.heads)

    @property
    def places(self) -> Places:
        """Where its rows begin."""
        if self._places is None:
            rows, room = self.batch * self.heads, self.keys.shape[2]
            self._places = Places(torch.arange(rows, dtype=torch.int64, device=self.device) * room)
        return self._places

    def _own_positions(self) -> None:
        if self.positions.shape[1] != self.heads:
            self.positions = self.positions.expand(-1, self.heads, -1).contiguous()

    def reorder(self, orders: Orders) -> None:
        """Put entries of some rows in another order, in place; each head has positions of its own then."""
        self._own_positions()
        super().reorder(orders)

    @property
    def parts(self) -> tuple[Part, ...]:
        """How a kernel must read it."""
        return plain("dense", self.keys.dtype)

    @property
    def chosen_parts(self) -> tuple[Part, ...]:
        """How a kernel must read chosen entries: as pages of one."""
        return plain("paged", self.keys.dtype, 1)

    def sequence(self, b: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Keys `[H_kv, n, D]`, values, positions `[H_kv, n]` and row lengths of one sequence."""
        n = self.length
        positions = self.positions[b, :, :n].expand(self.heads, n)
        return self.keys[b, :, :n], self.values[b, :, :n], positions, [n] * self.heads

    def rows(self) -> list[Row]:
        """Each row's keys `[n, D]`, values and positions, sequence-major."""
        out = []
        for b in range(self.batch):
            keys, values, positions, _ = self.sequence(b)
            out += [(keys[h], values[h], positions[h]) for h in range(self.heads)]
        return out

    def arrays(self) -> Arrays:
        """What compaction moves."""
        return Arrays(tuple(self.tensors()))

    def keep(self, indices: list[Tensor], headroom: int, compactor: Compactor = compact) -> DenseStore | RaggedStore:
        """A new store with only the entries `indices[row]` of each row, ragged where their numbers differ."""
        count = indices[0].numel()
        if any(index.numel() != count for index in indices):
            return RaggedStore.kept(self, indices, headroom, compactor)

        def room(old: Tensor) -> Tensor:
            return hugepages.empty(old, self.batch, self.heads, count + headroom, *old.shape[3:])

        values = None if self._values is None else room(self._values)
        target = DenseStore(room(self.keys), values, room(self.positions), count, self.latent)
        compactor(self.arrays(), target.arrays(), torch.cat(indices), [count] * len(indices))
        return target

    def select(self, sequences: Tensor) -> None:
        """Keep (or repeat, or reorder) sequences, in place: beam search and batch surgery."""
        self._change(lambda x: x[sequences])

    def drop_last(self, count: int) -> None:
        """Forget the newest `count` tokens of every row."""
        self.length -= count

    def oldest(self, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys `[n, D]`, values and positions of the first `counts[row]` entries (all alike), row after row."""
        n = counts[0]
        positions = self.positions[:, :, :n].expand(-1, self.heads, -1)
        return self.keys[:, :, :n].flatten(0, 2), self.values[:, :, :n].flatten(0, 2), positions.flatten()

    def shed(self, counts: list[int], compactor: Compactor = compact) -> None:
        """Forget the first `counts[row]` entries (all alike) of each row, in place."""
        n, rest = counts[0], self.length - counts[0]
        for x in self.tensors():  # one stretch of every row: there is nothing to gather
            x[:, :, :rest] = x[:, :, n : self.length].clone()
        self.length = rest

    def nbytes(self) -> int:
        """Bytes of the keys and values held (not of the room behind them)."""
        tensors = [self.keys] if self._values is None else [self.keys, self._values]
        return sum(_bytes(x[:, :, : self.length]) for x in tensors)

    def moved(self, move: Callable[[Tensor], Tensor]) -> DenseStore:
        """A store of the same entries whose every tensor is what `move` makes of this one's."""
        values = None if self._values is None else move(self._values)
        return DenseStore(move(self.keys), values, move(self.positions), self.length, self.latent)

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        own = [] if self._values is None else [self._values]
        return [self.keys, *own, self.positions]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def of_rows(
    rows: list[Row], batch: int, heads: int, headroom: int, latent: int | None = None
) -> DenseStore | RaggedStore:
    """A store of the given rows, dense if they have one length. latent: as the stores say."""
    if len({len(p) for _, _, p in rows}) > 1:
        return RaggedStore.of(rows, batch, heads, headroom, latent)
    keys, values, positions = (torch.unflatten(torch.stack(x), 0, (batch, heads)) for x in zip(*rows, strict=True))
    count = positions.shape[2]
    whole = torch.arange(count, device=keys.device, dtype=torch.int64)
    return DenseStore(keys, values, positions, count, latent).keep([whole] * len(rows), headroom)
