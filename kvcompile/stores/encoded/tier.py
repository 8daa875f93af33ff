"""One precision tier of a layer's rows: encoded entries in no order, and how much attention each has received."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.kernels.compact import Compactor, compact
from kvcompile.kernels.demote import NEVER, TierRows
from kvcompile.kernels.layout import RaggedView
from kvcompile.stores.base import Move
from kvcompile.stores.encoded.codes import Codes, Format, RaggedCodes


@dataclass(frozen=True)
class Received:
    """Attention that the entries of one row have received, oldest first: sums `[n]`, from queries `since [n]` on."""

    sums: Tensor
    since: Tensor


class Tier(RaggedCodes):
    """Encoded entries of each row, in places that an entry keeps until it leaves; every token has scales of its own.

    Where attention is counted, place j of row r has got `received[r, j]` of it from the queries at positions from
    `since[r, j]` on (both float32 `[R, most places]`, positions exact below 2^24).
    """

    received: Tensor | None = None
    since: Tensor | None = None

    @classmethod
    def of(
        cls,
        pieces: Sequence[tuple[Codes, list[int]]],
        format: Format,
        batch: int,
        heads: int,
        headroom: int,
        compactor: Compactor = compact,
    ) -> Tier:
        """A tier of all `(codes, counts)`: of each, the next `counts[r]` entries belong to row r."""
        lengths = [sum(row) for row in zip(*(counts for _, counts in pieces), strict=True)]
        tier = cls(pieces[0][0], format, batch, heads, [n + headroom for n in lengths])
        for codes, counts in pieces:
            if any(counts):
                tier.append(counts, codes, headroom, compactor)
        return tier

    def picked(self, places: list[Tensor]) -> tuple[Codes, list[int]]:
        """The entries in `places[r]` of each row, row after row, and how many of each."""
        slots = torch.cat([begin + at for begin, at in zip(self._begins, places, strict=True)])
        return self.codes.moved(lambda x: x[slots]), [at.numel() for at in places]

    def positions(self, row: int) -> Tensor:
        """True positions of the entries of a row, place by place."""
        return self.codes.positions[self.starts[row] : self.starts[row] + self.lengths[row]]

    @property
    def entries(self) -> TierRows:
        """What a demoter changes."""
        if self.received is None or self.since is None:
            raise RuntimeError("attention is not counted in this tier")
        c, rows = self.codes, (self.starts, self.lengths, self.batch, self.heads, self._begins, self._ends)
        view = RaggedView(c.keys, c.shown, c.positions, *rows, c.key_scales, c.value_scales)
        return TierRows(view, self.format.key, self.format.value, self.received, self.since)

    def lengthen(self, rows: list[bool]) -> None:
        """Count the entry that was put behind each of these rows."""
        if not any(rows):
            return
        self.lengths = [n + more for n, more in zip(self.lengths, rows, strict=True)]
        lengths = torch.tensor(self.lengths, device=self._begins.device, dtype=torch.int64)
        self._ends = self._begins + lengths

    def reserve(self, headroom: int, compactor: Compactor = compact) -> None:
        """Room for one more entry in every row; where one is full all rows move, once, to `headroom` entries of it."""
        if any(n >= room for n, room in zip(self.lengths, self.rooms, strict=True)):
            rooms = [n + headroom for n in self.lengths]
            self._become(self._gathered(range(len(rooms)), self._own(), self.batch, rooms, compactor))
        if self.received is not None and self.since is not None and max(self.lengths) >= self.received.shape[1]:
            self.received = F.pad(self.received, (0, headroom), value=NEVER)
            self.since = F.pad(self.since, (0, headroom))

    def count(self, received: list[Tensor], since: list[Tensor], headroom: int) -> None:
        """From here on attention is counted; of each row, what its entries have `received` so far, `since` when."""
        shape = len(received), max(self.lengths) + headroom
        device = self._begins.device
        self.received = torch.full(shape, NEVER, device=device, dtype=torch.float32)
        self.since = torch.zeros(shape, device=device, dtype=torch.float32)
        for r, (sums, start) in enumerate(zip(received, since, strict=True)):
            self.received[r, : sums.numel()], self.since[r, : start.numel()] = sums, start

    def keep(self, indices: list[Tensor], headroom: int, compactor: Compactor = compact) -> Tier:
        """A new tier with only the entries in the places `indices[row]` of each row."""
        tier = Tier.of([self.picked(indices)], self.format, self.batch, self.heads, headroom, compactor)
        if self.received is not None and self.since is not None:
            rows = list(enumerate(indices))
            tier.count([self.received[r, at] for r, at in rows], [self.since[r, at] for r, at in rows], headroom)
        return tier

    def select(self, sequences: Tensor) -> None:
        """Keep (or repeat, or reorder) sequences, in place."""
        super().select(sequences)
        if self.received is not None and self.since is not None:
            heads = torch.arange(self.heads, device=sequences.device, dtype=torch.int64)
            rows = (sequences[:, None] * self.heads + heads).flatten().to(self.received.device)
            self.received, self.since = self.received[rows], self.since[rows]

    def moved(self, move: Move) -> Tier:
        """A tier of the same entries whose every tensor is what `move` makes of this one's."""
        tier = copy.copy(self)
        tier.__dict__.update(super().moved(move).__dict__)
        tier.received, tier.since = (None if x is None else move(x) for x in (self.received, self.since))
        return tier

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        return [*super().tensors(), *(x for x in (self.received, self.since) if x is not None)]
