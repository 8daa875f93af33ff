"""Which groups of entries a step recalls: scored by what stands for them, the best taken until a budget is met.

Plain torch: the oracle of generated choosers, and what backends without one run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvcompile.kernels.compact import placed
from kvcompile.plan.recall import Agreement, Form


@dataclass(frozen=True)
class ChooseSpec:
    """One specialised chooser.

    form: what stands for a group, a `vector` r (wanted by q . r) or `bounds` (by sum_d max(q_d low_d, q_d high_d)).
    agree: how the queries of a KV head agree, by their `mean` or `max`. group: how many they are. dtype: of both.
    together: so many consecutive rows (the KV heads of a sequence) take the same groups, by the sum of their scores.
    """

    form: Form
    agree: Agreement
    group: int
    head_dim: int
    dtype: str
    together: int = 1

    @property
    def name(self) -> str:
        """Readable and unique: `choose-vector-mean-float32-g3-d64`, `...-t2` where two rows choose together."""
        end = f"-t{self.together}" if self.together > 1 else ""
        return f"choose-{self.form}-{self.agree}-{self.dtype}-g{self.group}-d{self.head_dim}{end}"


@dataclass(frozen=True, eq=False)
class GroupTable:
    """The groups of each row, oldest first: `representatives [R, G, D]` or `[R, G, 2, D]`.

    `starts`, `sizes [R, G]` int32: the entries of a group are `starts : starts + sizes` of its row; a size of 0 is no
    group. Groups of a row lie back to back, from entry `first` on; `ends[r]` is where the last one ends.
    """

    representatives: Tensor
    starts: Tensor
    sizes: Tensor
    ends: list[int]
    first: int


@dataclass(frozen=True)
class Places:
    """Where entries lie: entry j of row r at slot `rows[r] + j`, or in pages at `rows[r, j // page] * page + j % page`.

    rows: `[R]` int64, or the table of pages `[R, longest row in pages]` int32.
    """

    rows: Tensor
    page: int = 0

    def slots(self, entries: Tensor) -> Tensor:
        """Where `entries [R, n]` (int32) of the rows lie, `[R, n]` int32."""
        if not self.page:
            return entries + self.rows.int().unsqueeze(1)
        return self.rows.gather(1, (entries // self.page).long()) * self.page + entries % self.page

    def of(self, table: EntryTable) -> Tensor:
        """Where the entries of a table lie, `[R, longest]` int32."""
        return self.slots(table.entries) if table.slots is None else table.slots


@dataclass(frozen=True)
class EntryTable:
    """Some entries of each row, ascending: those of row r are `entries[r, : lengths[r]]`.

    entries: `[R, longest]` int32, 0 past a row's end. counts: the lengths as a tensor `[R]`, int64, on the same device.
    slots: where they lie just now, `[R, longest]` int32, where that is known; past a row's end whatever is no harm.
    """

    entries: Tensor
    lengths: list[int]
    counts: Tensor
    slots: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor | list[Tensor], device: torch.device) -> EntryTable:
        """From a table `[R, n]`, or one tensor a row, with entries of any integer dtype."""
        lengths = [len(row) for row in rows]
        counts = torch.tensor(lengths, dtype=torch.int64, device=device)
        if not isinstance(rows, Tensor):
            rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return cls(rows.to(device, torch.int32).contiguous(), lengths, counts)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Tensor]:
        """The entries of each row, int64."""
        return (row[:n] for row, n in zip(self.entries.long(), self.lengths, strict=True))

    def extended(self, starts: list[int], stops: list[int]) -> EntryTable:
        """With the entries `starts[r] : stops[r]` behind those of row r; where they lie may have changed."""
        added = [stop - start for start, stop in zip(starts, stops, strict=True)]
        lengths = [n + more for n, more in zip(self.lengths, added, strict=True)]
        rows, steps = placed(added, None, self.entries.device)
        begins = torch.tensor(starts, dtype=torch.int64, device=self.entries.device)
        entries = self.entries.new_zeros(len(lengths), max(lengths))
        entries[:, : self.entries.shape[1]] = self.entries
        entries[rows, self.counts[rows] + steps] = (begins[rows] + steps).int()
        return EntryTable(entries, lengths, self.counts + torch.tensor(added, dtype=torch.int64, device=entries.device))

    def split(self, ends: list[int]) -> tuple[EntryTable, EntryTable]:
        """The entries of each row before `ends[r]`, and those from there on, counted from there."""
        entries, place = (
            self.entries,
            torch.arange(self.entries.shape[1], dtype=torch.int64, device=self.entries.device),
        )
        border = torch.tensor(ends, dtype=torch.int32, device=entries.device).unsqueeze(1)
        before = (entries < border) & (place < self.counts.unsqueeze(1))
        counts = before.sum(1)
        inside = counts.tolist()
        behind = [n - old for n, old in zip(self.lengths, inside, strict=True)]
        old = entries.where(before, 0)[:, : max(inside)]
        rest = place[: max(behind)] + counts.unsqueeze(1)
        new = entries.gather(1, rest.clamp(max=entries.shape[1] - 1)) - border
        new = new.where(rest < self.counts.unsqueeze(1), 0)
        return EntryTable(old, inside, counts), EntryTable(new, behind, self.counts - counts)


class Chooser(Protocol):
    """A way to choose: the contract of `choose`."""

    def __call__(
        self,
        queries: Tensor,
        table: GroupTable,
        wanted: list[int],
        lengths: list[int],
        agree: Agreement,
        together: int = 1,
        places: Places | None = None,
    ) -> EntryTable:
        """The entries that each row reads."""
        ...


def spec_of(queries: Tensor, table: GroupTable, agree: Agreement, together: int = 1) -> ChooseSpec:
    """The chooser that these need."""
    form: Form = "vector" if table.representatives.dim() == 3 else "bounds"
    dtype = str(queries.dtype).removeprefix("torch.")
    return ChooseSpec(form, agree, queries.shape[1], queries.shape[2], dtype, together)


def chosen_lengths(table: GroupTable, wanted: list[int], lengths: list[int]) -> list[int]:
    """How many entries each row reads: those before its groups, `wanted` ones of them, those after."""
    rows = zip(wanted, lengths, table.ends, strict=True)
    return [min(table.first, n) + taken + max(0, n - end) for taken, n, end in rows]


def scores(queries: Tensor, table: GroupTable, agree: Agreement, together: int = 1) -> Tensor:
    """How much the queries `[R, g, D]` of each row want its groups, `[R, G]`, float32; -inf where there is none.

    together: so many consecutive rows want what they want in sum; their groups are alike.
    """
    representatives, q = table.representatives.float(), queries.float()
    if representatives.dim() == 3:
        by_query = q @ representatives.mT
    else:  # max(q low, q high) = q+ high - q- low, by the sign of each channel
        by_query = q.clamp(min=0) @ representatives[:, :, 1].mT + q.clamp(max=0) @ representatives[:, :, 0].mT
    agreed = by_query.sum(1) if agree == "mean" else by_query.amax(1)
    if together > 1:
        agreed = torch.unflatten(agreed, 0, (-1, together)).sum(1).repeat_interleave(together, 0)
    if agree == "mean":  # once all is added up, so that sums that are equal stay so
        agreed = agreed / q.shape[1]
    return agreed.masked_fill(table.sizes == 0, float("-inf"))


def taken(scored: Tensor, sizes: Tensor, wanted: Tensor) -> Tensor:
    """Entries taken of each group, `[R, G]` int64: all of the best groups until `wanted [R]`; the last one is cut.

    Of groups that score alike the older is taken first.
    """
    order = scored.sort(dim=1, descending=True, stable=True).indices
    ranked = sizes.long().gather(1, order)
    left = wanted.unsqueeze(1) - (ranked.cumsum(1) - ranked)
    return torch.zeros_like(ranked).scatter_(1, order, left.clamp(min=0).minimum(ranked))


def choose(
    queries: Tensor,
    table: GroupTable,
    wanted: list[int],
    lengths: list[int],
    agree: Agreement,
    together: int = 1,
    places: Places | None = None,
) -> EntryTable:
    """The entries that each row reads: those before its groups, the best `wanted[r]` of them, those after.

    Args:
        queries: `[R, g, D]`.
        table: the groups of each row.
        wanted: entries of groups to take, at most as many as the row's groups have.
        lengths: entries of each row.
        agree: how the queries of a row agree on a group, by the `mean` or the `max` of what they score.
        together: so many consecutive rows choose alike, by the sum of their scores; `starts`, `sizes` and `wanted` of
            these rows must be alike too.
        places: where the rows lie, so that the table says it of the entries; None: it does not.
    """
    numbers = torch.tensor([wanted, lengths, table.ends], dtype=torch.int64, device=queries.device)
    took = taken(scores(queries, table, agree, together), table.sizes, numbers[0])
    return listed(table, took, numbers, chosen_lengths(table, wanted, lengths), places)


def listed(
    table: GroupTable, took: Tensor, numbers: Tensor, totals: list[int], places: Places | None = None
) -> EntryTable:
    """What is read of each row, one entry after the other.

    Args:
        table: the groups.
        took: entries taken of each, `[R, G]` int64.
        numbers: entries wanted of all groups, the length of each row, and where its groups end, `[3, R]` int64.
        totals: how many entries each row reads.
        places: where the rows lie.
    """
    length, end = numbers[1:, :, None]
    first = length.clamp(max=table.first)
    begins = torch.cat((torch.zeros_like(first), table.starts.long(), end), 1)
    counts = torch.cat((first, took, (length - end).clamp(min=0)), 1)
    stops = counts.cumsum(1)
    place = torch.arange(max(totals), dtype=torch.int64, device=took.device).expand(len(totals), -1).contiguous()
    stretch = torch.searchsorted(stops, place, right=True)
    there = stretch < stops.shape[1]
    stretch = stretch.clamp(max=stops.shape[1] - 1)
    entries = (begins.gather(1, stretch) + place - (stops - counts).gather(1, stretch)).where(there, 0).int()
    return EntryTable(entries, totals, stops[:, -1].contiguous(), None if places is None else places.slots(entries))
