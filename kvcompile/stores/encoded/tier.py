"""One precision tier of a layer's rows: encoded entries in no order, and how much attention each has received."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.kernels.compact import Compactor, compact
from kvcompile.stores.base import Move
from kvcompile.stores.encoded.codes import Codes, Format, RaggedCodes

NEVER = float("inf")  # received by places without an entry and by entries that always stay: none of them is weakest


@dataclass(frozen=True)
class Received:
    """Attention that the entries of one row have received, oldest first: sums `[n]`, from queries `since [n]` on."""

    sums: Tensor
    since: Tensor


@dataclass(frozen=True)
class Demotion:
    """What a decoded token does to each row, all `[R]`: the weakest high entry leaves its place `high` to the token.

    The entry is dropped (`drops`), takes the place `low` of the weakest low one (`replaces`), or a new place in the low
    tier (`lowers`); where it does none of the three it stays, and the token gets a new place.
    """

    high: Tensor
    low: Tensor
    drops: Tensor
    replaces: Tensor
    lowers: Tensor

    def among(self, rows: Tensor) -> Demotion:
        """The same in `rows` (bool) alone."""
        return Demotion(self.high, self.low, self.drops & rows, self.replaces & rows, self.lowers & rows)


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

    def taken(self, rows: Tensor, places: Tensor) -> Codes:
        """The entries in `places [n]` of `rows [n]`."""
        slots = self._begins[rows] + places
        return self.codes.moved(lambda x: x[slots])

    def picked(self, places: list[Tensor]) -> tuple[Codes, list[int]]:
        """The entries in `places[r]` of each row, row after row, and how many of each."""
        slots = torch.cat([begin + at for begin, at in zip(self._begins, places, strict=True)])
        return self.codes.moved(lambda x: x[slots]), [at.numel() for at in places]

    @property
    def places(self) -> Tensor:
        """The place behind each row, `[R]`: how many entries it has."""
        return self._ends - self._begins

    def positions(self, row: int) -> Tensor:
        """True positions of the entries of a row, place by place."""
        return self.codes.positions[self.starts[row] : self.starts[row] + self.lengths[row]]

    def put(self, rows: Tensor, places: Tensor, codes: Codes, received: Tensor, since: Tensor) -> None:
        """Write entries into `places [n]` of `rows [n]`, over what was there; a place behind a row needs its room."""
        slots = self._begins[rows] + places
        for old, new in zip(self.codes.tensors, codes.tensors, strict=True):
            old.index_copy_(0, slots, new)
        sums, starts = self._counted()
        sums[rows, places], starts[rows, places] = received, since

    def add(self, received: Tensor) -> None:
        """Add what the entries in the first places have received more, `[R, n]`; where there is none it is ignored."""
        sums, _ = self._counted()
        sums[:, : received.shape[1]].add_(received)

    def standing(self, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """What the entries in `places [n]` of `rows [n]` have received, and since when."""
        sums, since = self._counted()
        return sums[rows, places], since[rows, places]

    def weakest(self, tokens: Tensor, recent: int = 0) -> tuple[Tensor, Tensor]:
        """Of each row the least mean attention of an entry, and its place; infinity where there is none to choose.

        tokens: seen so far, float32 `[R]`; the `recent` newest of them are not chosen.
        """
        sums, since = (x[:, : max(self.lengths)] for x in self._counted())
        if not sums.shape[1]:
            return torch.full_like(tokens, NEVER), torch.zeros_like(tokens, dtype=torch.int64)
        mean = sums / (tokens.unsqueeze(1) - since)
        if recent:
            mean.masked_fill_(since >= (tokens - recent).unsqueeze(1), NEVER)
        least = mean.min(1)
        return least.values, least.indices

    def _counted(self) -> tuple[Tensor, Tensor]:
        if self.received is None or self.since is None:
            raise RuntimeError("attention is not counted in this tier")
        return self.received, self.since

    def lengthen(self, rows: list[bool]) -> None:
        """Count the entry that was put behind each of these rows."""
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
