"""Rows in two precisions: a low tier, a high one, and the newest tokens in the model's own dtype."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvcompile.kernels.codecs import Encoder, encode
from kvcompile.kernels.compact import Compactor, compact
from kvcompile.kernels.demote import Demoter, NewTokens, Outcome, Rule, demote
from kvcompile.kernels.layout import MixedView, View
from kvcompile.kernels.spec import Part
from kvcompile.plan.storage import Storage
from kvcompile.stores.base import Chosen, Move, Row
from kvcompile.stores.dense import DenseStore
from kvcompile.stores.encoded.base import EncodedStore
from kvcompile.stores.encoded.codes import Codes, Format
from kvcompile.stores.encoded.scales import ordinary, require_held
from kvcompile.stores.encoded.tier import Received, Tier
from kvcompile.stores.ragged import RaggedStore, padded

LOW, HIGH, NEW = range(3)  # the parts of a row, in the order in which a kernel reads them


class TieredStore(EncodedStore):
    """Each row is the entries of its low tier, those of its high tier, and the tokens that are in neither yet.

    New tokens come in the model's dtype, so that their own pass reads them exactly. Then `divide` puts every entry
    into the tier that a selection wants, `demote` the newest token of each row into the high tier and one other entry
    where it belongs now, `flush` all that is new into the high tier. What is low stays low: its codes know no better.
    `rows` and `sequence` have entries in the order of their positions, the view has them part by part.
    Source: two levels of precision a head, DiffKV (LeanKV), arXiv 2412.03131, sections 4 and 5.
    """

    def __init__(
        self, storage: Storage, newest: DenseStore | RaggedStore, encoder: Encoder = encode, layer: int = 0
    ) -> None:
        if storage.low is None:
            raise RuntimeError("a tiered store is opened for a storage with a low tier")
        self.storage, self.residual, self.layer = storage, newest, layer
        dtype = newest.keys.dtype
        self.formats = (
            Format(*storage.low, dtype, encoder),
            Format(*storage.codecs(str(dtype).removeprefix("torch.")), dtype, encoder),
        )
        self.tiers: tuple[Tier, Tier] | None = None

    @property
    def low(self) -> list[int]:
        """Tokens of each row in the low tier."""
        return self.tiers[LOW].lengths if self.tiers else [0] * (self.batch * self.heads)

    @property
    def coded(self) -> tuple[Tier, ...]:
        """The tiers, once there are any."""
        return self.tiers or ()

    @property
    def in_order(self) -> bool:
        """Whether the view has entries in the order of their positions: while nothing is in a tier."""
        return self.tiers is None

    def divide(
        self,
        high: list[Tensor],
        low: list[Tensor],
        received: list[Received | None],
        headroom: int,
        compactor: Compactor = compact,
    ) -> None:
        """Hold the entries `high[row]` and `low[row]` (ascending) in their tiers, new ones encoded; drop all others.

        received: of every entry of a row; None: as it was. Raises KvcompileError for numbers that float16 scales
        cannot hold.
        """
        orders = self._orders()
        wanted = [self._parted(entries, orders) for entries in (low, high)]
        if self.tiers is not None:
            wanted[LOW][LOW] = [torch.cat(pair) for pair in zip(wanted[LOW][LOW], wanted[HIGH][LOW], strict=True)]
            wanted[HIGH][LOW] = [places[:0] for places in wanted[HIGH][LOW]]
        tiers = [self._tier(i, places, headroom, compactor) for i, places in enumerate(wanted)]
        counted = [new or self.received(r) for r, new in enumerate(received)]
        if any(row is not None for row in counted):
            firsts = self._firsts()
            for tier, places in zip(tiers, wanted, strict=True):
                self._count(tier, places, orders, counted, firsts, headroom)
        self.tiers = tiers[LOW], tiers[HIGH]
        self._empty()

    def _tier(self, which: int, places: list[list[Tensor]], headroom: int, compactor: Compactor) -> Tier:
        """A tier of the entries in `places[part][row]`: those of a tier as they are or lowered, new ones encoded."""
        format, pieces = self.formats[which], []
        for part, tier in enumerate(self.coded):
            if part < which:  # nothing low becomes high
                continue
            codes, counts = tier.picked(places[part])
            pieces.append((codes if part == which else self._lowered(codes), counts))
        rows = [[x[at] for x in row] for row, at in zip(self.residual.rows(), places[NEW], strict=True)]
        keys, values, positions = (torch.cat(x) for x in zip(*rows, strict=True))
        pieces.append((self._encoded(keys, values, positions, format), [at.numel() for at in places[NEW]]))
        return Tier.of(pieces, format, self.batch, self.heads, headroom, compactor)

    def _count(
        self,
        tier: Tier,
        places: list[list[Tensor]],
        orders: list[Tensor],
        counted: list[Received | None],
        firsts: list[tuple[int, int, int]],
        headroom: int,
    ) -> None:
        """Let a new tier of the entries in `places[part][row]` go on from what they received."""
        sums, since = [], []
        for r, (row, order) in enumerate(zip(counted, orders, strict=True)):
            at = torch.cat([first + of_part[r] for first, of_part in zip(firsts[r], places, strict=True)])
            none = torch.zeros(order.numel(), device=order.device, dtype=torch.float32)
            row = row or Received(none, none)
            rank = order.argsort()[at]  # by position
            sums.append(row.sums[rank])
            since.append(row.since[rank])
        tier.count(sums, since, headroom)

    def received(self, row: int) -> Received | None:
        """What each entry of a row has received, oldest first, new ones nothing; None where it is not counted."""
        if self.tiers is None or self.tiers[HIGH].received is None:
            return None
        positions = self.residual.rows()[row][2].float()
        sums = [tier.received[row, : tier.lengths[row]] for tier in self.tiers if tier.received is not None]
        since = [tier.since[row, : tier.lengths[row]] for tier in self.tiers if tier.since is not None]
        order = self._orders([row])[0]
        return Received(torch.cat([*sums, torch.zeros_like(positions)])[order], torch.cat([*since, positions])[order])

    def demote(
        self, sums: Tensor, rule: Rule, headroom: int, compactor: Compactor = compact, demoter: Demoter = demote
    ) -> int:
        """Put the new token of each row that has one into the high tier, and what it pushes out where the `rule` says.

        sums: what every entry has received from the newest queries, `[R, n]` in the order of the view. Returns how many
        entries were dropped. Raises KvcompileError for numbers that float16 scales cannot hold.
        """
        tiers, arrived = self.divided(), self.residual.lengths
        for tier in tiers:
            tier.reserve(headroom, compactor)
        low, high = tiers
        keys, values, positions = self.residual.oldest(arrived)
        new = NewTokens(keys, values, positions, [r for r, n in enumerate(arrived) if n])
        demoted = demoter(low.entries, high.entries, new, sums, rule, self.formats[HIGH].encoder)
        if not all(map(ordinary, demoted.scales)):
            self._encoded(keys, values, positions, self.formats[HIGH])
        low.lengthen([o == Outcome.LOWERS for o in demoted.outcomes])
        high.lengthen([o == Outcome.GROWS for o in demoted.outcomes])
        self._empty()
        return sum(o in (Outcome.DROPS, Outcome.REPLACES) for o in demoted.outcomes)

    def divided(self) -> tuple[Tier, Tier]:
        """The tiers, once there are any."""
        if self.tiers is None:
            raise RuntimeError(f"layer {self.layer} has no tiers before the end of its first prefill")
        return self.tiers

    def flush(
        self, headroom: int, release: bool, compactor: Compactor = compact, concerned: list[bool] | None = None
    ) -> bool:
        """Put all new tokens into the high tier; whether there were any. Before a selection has divided rows: nothing.

        Raises KvcompileError for numbers that float16 scales cannot hold.
        """
        counts = self.residual.lengths
        if self.tiers is None or not any(counts):
            return False
        new = self._encoded(*self.residual.oldest(counts), self.formats[HIGH])
        self.tiers[HIGH].append(counts, new, headroom, compactor)
        self._empty()
        return True

    def _encoded(self, keys: Tensor, values: Tensor, positions: Tensor, format: Format) -> Codes:
        """New tokens `[n, D]` in the codes of a format."""
        codes = Codes.of(keys, values, positions, format)
        if keys.numel():
            require_held(codes, (keys, values), format, self.storage.policy, self.layer)
        return codes

    def _lowered(self, codes: Codes) -> Codes:
        """High codes as those of the low tier: of the numbers that they decode to."""
        return Codes.of(*codes.decoded(self.formats[HIGH]), self.formats[LOW])

    def _empty(self) -> None:
        """No token is in neither tier any more."""
        keys, values = (
            x.new_empty(self.batch, self.heads, 0, x.shape[-1]) for x in (self.residual.keys, self.residual.values)
        )
        self.residual = DenseStore.empty(keys, values, 1)

    def _firsts(self) -> list[tuple[int, int, int]]:
        """Of each row, where its parts begin in the view."""
        low = self.low
        high = self.tiers[HIGH].lengths if self.tiers else [0] * len(low)
        return [(0, a, a + b) for a, b in zip(low, high, strict=True)]

    def _orders(self, rows: Sequence[int] | None = None) -> list[Tensor]:
        """The entries of each row in the order of their positions, by their place in the view."""
        newest = [positions for _, _, positions in self.residual.rows()]
        chosen = range(len(newest)) if rows is None else rows
        parts = ([*(tier.positions(r) for tier in self.coded), newest[r]] for r in chosen)
        return [torch.cat(positions).sort().indices for positions in parts]

    def _parted(self, entries: list[Tensor], orders: list[Tensor]) -> list[list[Tensor]]:
        """The `entries` of each row (oldest first) by part, `[part][row]`: their places in it."""
        parts: list[list[Tensor]] = [[], [], []]
        for index, order, firsts in zip(entries, orders, self._firsts(), strict=True):
            at = order[index]
            for part, (first, end) in enumerate(zip(firsts, (*firsts[1:], order.numel()), strict=True)):
                parts[part].append(at[(at >= first) & (at < end)] - first)
        return parts

    def view(self, chosen: Chosen | None = None) -> View:
        """What a kernel reads, part by part: all entries, or those `chosen` (by their order in `rows`)."""
        if self.tiers is None:
            return self.residual.view(chosen)
        low, high = self.tiers
        if chosen is None:
            return MixedView((low.segment(), high.segment(), self.residual.view()))
        places = self._parted(list(chosen), self._orders())
        return MixedView((low.segment(places[LOW]), high.segment(places[HIGH]), self.residual.view(places[NEW])))

    @property
    def chosen_parts(self) -> tuple[Part, ...]:
        """How a kernel must read chosen entries: as pages of one."""
        tiers = (replace(tier.part, layout="paged", page=1) for tier in self.coded)
        return (*tiers, *self.residual.chosen_parts)

    def rows(self) -> list[Row]:
        """Each row's keys `[n, D]`, values and positions, sequence-major, oldest first, in the model's dtype."""
        return self._rows(range(self.batch * self.heads))

    def _rows(self, rows: range) -> list[Row]:
        newest, ordered = self.residual.rows(), []
        for r, order in zip(rows, self._orders(rows), strict=True):
            parts = [*(tier.row(r) for tier in self.coded), newest[r]]
            keys, values, positions = (torch.cat(x)[order] for x in zip(*parts, strict=True))
            ordered.append((keys, values, positions))
        return ordered

    def sequence(self, b: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Keys `[H_kv, n, D]`, values, positions `[H_kv, n]` (zeros and -1 past a row's end) and row lengths."""
        return padded(self._rows(range(b * self.heads, (b + 1) * self.heads)))

    def keep(self, indices: list[Tensor], headroom: int, compactor: Compactor = compact) -> TieredStore:
        """Keep only the entries `indices[row]` (ascending) of each row, each where it is."""
        places = self._parted(indices, self._orders())
        if self.tiers is not None:
            low, high = (tier.keep(places[i], headroom, compactor) for i, tier in enumerate(self.tiers))
            self.tiers = low, high
        self.residual = self.residual.keep(places[NEW], headroom, compactor)
        return self

    def stretch(self, row: int, start: int, stop: int) -> Tensor:
        """Keys `[n, D]` of a row's entries from `start` to `stop`, decoded."""
        return self._rows(range(row, row + 1))[0][0][start:stop]

    def moved(self, move: Move) -> TieredStore:
        """A store of the same entries whose every tensor is what `move` makes of this one's."""
        store = copy.copy(self)
        store.residual = self.residual.moved(move)
        if self.tiers is not None:
            store.tiers = self.tiers[LOW].moved(move), self.tiers[HIGH].moved(move)
        return store
