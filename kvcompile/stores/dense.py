"""The dense layout: every row of a layer holds the same number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcompile.kernels.compact import Arrays, Compactor, compact
from kvcompile.kernels.layout import DenseView
from kvcompile.kernels.spec import Part, plain
from kvcompile.stores import hugepages

POSITION_TYPE = torch.int32


class DenseStore:
    """Keys `[B, H_kv, capacity, D]`, values, true positions `[B, H_kv or 1, capacity]`, one length for all rows.

    Appending writes into room kept at the end; a full store grows by `headroom` tokens, so that a token costs a
    copy of its own keys only. `latent`: values are the channels of the keys from this one on, and have no memory.
    """

    layout = "dense"

    def __init__(
        self, keys: Tensor, values: Tensor | None, positions: Tensor, length: int, latent: int | None = None
    ) -> None:
        self.keys, self.positions, self.length, self.latent = keys, positions, length, latent
        self._values = values if latent is None else None

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
    def batch(self) -> int:
        """Sequences held."""
        return self.keys.shape[0]

    @property
    def heads(self) -> int:
        """KV heads held."""
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.keys.device

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each row (sequence-major)."""
        return [self.length] * (self.batch * self.heads)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, headroom: int) -> None:
        """Add `keys [B, H_kv, Q, D]`, `values`, at true `positions [B, Q]`."""
        start, stop = self.length, self.length + keys.shape[2]
        if stop > self.keys.shape[2]:
            self._grow(stop + headroom)
        self.keys[:, :, start:stop] = keys
        if self._values is not None:
            self._values[:, :, start:stop] = values
        self.positions[:, :, start:stop] = positions.unsqueeze(1)
        self.length = stop

    def _grow(self, capacity: int) -> None:
        def grown(old: Tensor) -> Tensor:
            new = hugepages.empty(old, *old.shape[:2], capacity, *old.shape[3:])
            new[:, :, : self.length] = old[:, :, : self.length]
            return new

        self._change(grown)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put changed tensors in place of all that are held."""
        self.keys, self.positions = change(self.keys), change(self.positions)
        self._values = None if self._values is None else change(self._values)

    def view(self) -> DenseView:
        """What a kernel reads."""
        n = self.length
        return DenseView(self.keys[:, :, :n], self.values[:, :, :n], self.positions[:, :, :n])

    @property
    def parts(self) -> tuple[Part, ...]:
        """How a kernel must read it."""
        return plain("dense", self.keys.dtype)

    def sequence(self, b: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Keys `[H_kv, n, D]`, values, positions `[H_kv, n]` and row lengths of one sequence."""
        n = self.length
        positions = self.positions[b, :, :n].expand(self.heads, n)
        return self.keys[b, :, :n], self.values[b, :, :n], positions, [n] * self.heads

    def rows(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Each row's keys `[n, D]`, values and positions, sequence-major."""
        out = []
        for b in range(self.batch):
            keys, values, positions, _ = self.sequence(b)
            out += [(keys[h], values[h], positions[h]) for h in range(self.heads)]
        return out

    def arrays(self) -> Arrays:
        """What compaction moves."""
        return Arrays(tuple(self.tensors()))

    def take(self, indices: list[Tensor], headroom: int, compactor: Compactor = compact) -> DenseStore:
        """A new store with only the entries `indices[row]` of each row, all of one number."""
        count = indices[0].numel()

        def room(old: Tensor) -> Tensor:
            return hugepages.empty(old, self.batch, self.heads, count + headroom, *old.shape[3:])

        values = None if self._values is None else room(self._values)
        made = DenseStore(room(self.keys), values, room(self.positions), count, self.latent)
        compactor(self.arrays(), made.arrays(), torch.cat(indices), [count] * len(indices))
        return made

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
        held = [self.keys] if self._values is None else [self.keys, self._values]
        return sum(_bytes(x[:, :, : self.length]) for x in held)

    def moved(self, move: Callable[[Tensor], Tensor]) -> DenseStore:
        """A store of the same entries whose every tensor is what `move` makes of this one's."""
        values = None if self._values is None else move(self._values)
        return DenseStore(move(self.keys), values, move(self.positions), self.length, self.latent)

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        own = [] if self._values is None else [self._values]
        return [self.keys, *own, self.positions]

    def allocated(self) -> int:
        """Bytes of everything allocated: keys, values, positions, room."""
        return sum(map(_bytes, self.tensors()))


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
