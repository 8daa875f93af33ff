"""The ragged layout: every (sequence, KV head) row has a length of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompile.kernels.choose import Places
from kvcompile.kernels.compact import Arrays, Compactor, compact
from kvcompile.kernels.layout import PagedView, RaggedView
from kvcompile.kernels.spec import Part, plain
from kvcompile.stores import hugepages
from kvcompile.stores.base import POSITION_TYPE, Chosen, Plain, Row, scattered, tabled

if TYPE_CHECKING:
    from kvcompile.stores.dense import DenseStore


class RaggedStore(Plain):
    """Rows back to back in flat buffers: keys `[T, D]`, values `[T, D]`, true positions `[T]`.

    Row `b * heads + h` occupies `starts[row] : starts[row] + lengths[row]` and may grow to `rooms[row]` tokens;
    when one row is full all are moved once, with `headroom` tokens of new room each.
    `latent`: values are the channels of the keys from this one on, and have no memory of their own.
    """

    def __init__(
        self,
        like_keys: Tensor,
        like_values: Tensor,
        batch: int,
        heads: int,
        rooms: list[int],
        latent: int | None = None,
    ) -> None:
        self.batch, self.heads, self.rooms, self.latent = batch, heads, rooms, latent
        self.starts = [0]
        for room in rooms[:-1]:
            self.starts.append(self.starts[-1] + room)
        total = sum(rooms)
        self.keys = hugepages.empty(like_keys, total, like_keys.shape[-1])
        self._values = hugepages.empty(like_values, total, like_values.shape[-1]) if latent is None else None
        self.positions = torch.empty(total, dtype=POSITION_TYPE, device=like_keys.device)
        self.lengths = [0] * len(rooms)
        self._begins = torch.tensor(self.starts, device=self.keys.device, dtype=torch.int64)
        self._mark_ends()

    @property
    def values(self) -> Tensor:
        """Values `[T, D_v]`."""
        return self.keys[:, self.latent :] if self._values is None else self._values

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.keys.device

    def _mark_ends(self) -> None:
        self._ends = self._begins + torch.tensor(self.lengths, device=self.keys.device, dtype=torch.int64)

    @classmethod
    def of(
        cls,
        rows: list[Row],
        batch: int,
        heads: int,
        headroom: int,
        latent: int | None = None,
    ) -> RaggedStore:
        """A store holding the given rows (keys `[n, D]`, values, positions), with `headroom` tokens behind each."""
        keys, values, _ = rows[0]
        store = cls(keys, values, batch, heads, [r[0].shape[0] + headroom for r in rows], latent)
        for i, (k, v, p) in enumerate(rows):
            store._write(i, k, v, p)
        store._mark_ends()
        return store

    def _write(self, row: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        start = self.starts[row] + self.lengths[row]
        stop = start + keys.shape[0]
        self.keys[start:stop], self.positions[start:stop] = keys, positions
        if self._values is not None:
            self._values[start:stop] = values
        self.lengths[row] += keys.shape[0]

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        headroom: int,
        valid: Tensor | None = None,
        compactor: Compactor = compact,
    ) -> RaggedStore:
        """Add `keys [B, H_kv, Q, D]`, `values`, at `positions [B, Q]`; only those `valid [B, Q]`."""
        count = keys.shape[2]
        added = [count] * self.batch if valid is None else [int(n) for n in valid.sum(1)]
        if any(n + added[i // self.heads] > self.rooms[i] for i, n in enumerate(self.lengths)):
            self._grow(max(added) + headroom)
        if count == 1 and valid is None:
            self.keys.index_copy_(0, self._ends, keys.reshape(len(self.rooms), -1))
            if self._values is not None:
                self._values.index_copy_(0, self._ends, values.reshape(len(self.rooms), -1))
            self.positions.index_copy_(
                0, self._ends, positions.to(POSITION_TYPE).repeat_interleave(self.heads, 0).view(-1)
            )
            self.lengths = [n + 1 for n in self.lengths]
            self._ends += 1
            return self
        if count == 1 and valid is not None:
            return self._append_one(keys, values, positions, valid.flatten(), added)
        for b in range(self.batch):
            real = slice(None) if valid is None else valid[b]
            for h in range(self.heads):
                self._write(b * self.heads + h, keys[b, h, real], values[b, h, real], positions[b, real])
        self._mark_ends()
        return self

    def _append_one(
        self, keys: Tensor, values: Tensor, positions: Tensor, real: Tensor, added: list[int]
    ) -> RaggedStore:
        """Add a token of the sequences `real [B]` alone, all their heads at once."""
        rows = real.repeat_interleave(self.heads)
        at = self._ends[rows]
        self.keys.index_copy_(0, at, keys[real].flatten(0, 2))
        if self._values is not None:
            self._values.index_copy_(0, at, values[real].flatten(0, 2))
        self.positions.index_copy_(0, at, positions[real].to(POSITION_TYPE).repeat_interleave(self.heads, 0).flatten())
        self.lengths = [n + added[i // self.heads] for i, n in enumerate(self.lengths)]
        self._ends += rows
        return self

    def _grow(self, room: int) -> None:
        grown = RaggedStore.of(self.rows(), self.batch, self.heads, room, self.latent)
        self.__dict__.update(grown.__dict__)

    def view(self, chosen: Chosen | None = None) -> RaggedView | PagedView:
        """What a kernel reads: all entries, or those `chosen`."""
        if chosen is not None:
            table = tabled(chosen, self.device)
            return scattered((self.keys, self.values, self.positions), self.places, table, self.heads)
        return RaggedView(
            self.keys,
            self.values,
            self.positions,
            self.starts,
            self.lengths,
            self.batch,
            self.heads,
            self._begins,
            self._ends,
        )

    @property
    def places(self) -> Places:
        """Where its rows begin."""
        return Places(self._begins)

    @property
    def parts(self) -> tuple[Part, ...]:
        """How a kernel must read it."""
        return plain("ragged", self.keys.dtype)

    @property
    def chosen_parts(self) -> tuple[Part, ...]:
        """How a kernel must read chosen entries: as pages of one."""
        return plain("paged", self.keys.dtype, 1)

    def rows(self) -> list[Row]:
        """Each row's keys `[n, D]`, values and positions, sequence-major."""
        spans = [slice(s, s + n) for s, n in zip(self.starts, self.lengths, strict=True)]
        return [(self.keys[at], self.values[at], self.positions[at]) for at in spans]

    def sequence(self, b: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Keys `[H_kv, n, D]`, values, positions `[H_kv, n]` (zeros and -1 past a row's end) and row lengths."""
        return padded(self.rows()[b * self.heads : (b + 1) * self.heads])

    def arrays(self) -> Arrays:
        """What compaction moves."""
        return Arrays(tuple(self.tensors()), starts=self._begins)

    @classmethod
    def kept(
        cls, store: DenseStore | RaggedStore, indices: list[Tensor], headroom: int, compactor: Compactor = compact
    ) -> RaggedStore:
        """A store with only the entries `indices[row]` of each row of another."""
        counts = [i.numel() for i in indices]
        rooms = [n + headroom for n in counts]
        target = cls(store.keys, store.values, store.batch, store.heads, rooms, store.latent)
        compactor(store.arrays(), target.arrays(), torch.cat(indices), counts)
        target.lengths = counts
        target._mark_ends()
        return target

    def keep(self, indices: list[Tensor], headroom: int, compactor: Compactor = compact) -> RaggedStore:
        """A new store with only the entries `indices[row]` of each row."""
        return RaggedStore.kept(self, indices, headroom, compactor)

    def select(self, sequences: Tensor) -> None:
        """Keep (or repeat, or reorder) sequences, in place: beam search and batch surgery."""
        rows = self.rows()
        chosen = [int(b) for b in sequences]
        if chosen == list(range(self.batch)):
            return
        picked = [rows[b * self.heads + h] for b in chosen for h in range(self.heads)]
        spare = max(room - n for room, n in zip(self.rooms, self.lengths, strict=True))
        self.__dict__.update(RaggedStore.of(picked, len(chosen), self.heads, spare, self.latent).__dict__)

    def drop_last(self, count: int) -> None:
        """Forget the newest `count` tokens of every row."""
        self.lengths = [n - count for n in self.lengths]
        self._mark_ends()

    def oldest(self, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys `[n, D]`, values and positions of the first `counts[row]` entries, row after row."""
        at = spans(self._begins, torch.tensor(counts, device=self.device, dtype=torch.int64))
        return self.keys[at], self.values[at], self.positions[at]

    def shed(self, counts: list[int], compactor: Compactor = compact) -> None:
        """Forget the first `counts[row]` entries of each row, in place."""
        rest = [length - n for length, n in zip(self.lengths, counts, strict=True)]
        begins, stay = (torch.tensor(x, device=self.device, dtype=torch.int64) for x in (counts, rest))
        compactor(self.arrays(), self.arrays(), spans(begins, stay), rest)
        self.lengths = rest
        self._mark_ends()

    def nbytes(self) -> int:
        """Bytes of the keys and values held (not of the room behind them)."""
        tensors = [self.keys] if self._values is None else [self.keys, self._values]
        per_token = sum(x.shape[-1] * x.element_size() for x in tensors)
        return sum(self.lengths) * per_token

    def moved(self, move: Callable[[Tensor], Tensor]) -> RaggedStore:
        """A store of the same entries whose every tensor is what `move` makes of this one's."""
        moved = copy.copy(self)
        moved.keys, moved.positions = move(self.keys), move(self.positions)
        moved._values = None if self._values is None else move(self._values)
        moved._begins, moved._ends = move(self._begins), move(self._ends)
        moved.lengths = list(self.lengths)
        return moved

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        own = [] if self._values is None else [self._values]
        return [self.keys, *own, self.positions]


def spans(begins: Tensor, counts: Tensor) -> Tensor:
    """The indices `begins[i], ..., begins[i] + counts[i] - 1` of every i, one after the other."""
    before = counts.cumsum(0) - counts
    within = torch.arange(int(counts.sum()), device=counts.device, dtype=torch.int64) - before.repeat_interleave(counts)
    return begins.repeat_interleave(counts) + within


def padded(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Keys `[rows, n, D]`, values, positions `[rows, n]` (zeros and -1 past a row's end) and row lengths."""
    keys, values, positions = zip(*rows, strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(list(keys), batch_first=True),
        pad(list(values), batch_first=True),
        pad(list(positions), batch_first=True, padding_value=-1),
        [len(p) for p in positions],
    )
