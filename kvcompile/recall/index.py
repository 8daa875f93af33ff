"""The groups of one layer's entries: made as entries leave the newest ones, read at each step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.choose import GroupTable
from kvcompile.plan.recall import Entries, Groups, Recall
from kvcompile.plan.storage import Storage
from kvcompile.recall.received import Received
from kvcompile.stores.base import Store

ROOM = 16  # groups of room behind those of the row that has the most


class Index:
    """What stands for the groups of each row, and where in the row their entries lie.

    Row `b * heads + h` belongs to sequence b and KV head h, as in the store. The groups of a row lie back to back after
    its first `first` entries. `covered[r]`: entries in groups; `counts[r]`: groups. `received`: attention to the
    entries behind the groups, where the grouping asks for it.
    """

    def __init__(self, recall: Recall, storage: Storage, rows: int) -> None:
        self.recall, self.unit = recall, storage.block
        self.first, self.recent = recall.first(self.unit), recall.newest(storage)
        self.covered, self.counts = [0] * rows, [0] * rows
        self.table: GroupTable | None = None
        self.received: Received | None = None

    def receive(self, columns: Tensor, ends: list[int], lengths: list[int]) -> None:
        """Add what entries received: `columns [R, n]`, of which the first `ends[r]` are of a row, its newest last.

        lengths: entries of each row. Those among its sinks or in groups are of no interest.
        """
        if self.received is None:
            self.received = Received(len(lengths), columns.device)
        behind = [max(0, n - self.first - covered) for n, covered in zip(lengths, self.covered, strict=True)]
        self.received.add(columns, ends, behind)

    def due(self, lengths: list[int], least: int) -> dict[int, list[int]]:
        """Rows of `lengths` in which `least` entries or more can be grouped, by how many those are."""
        by_count: dict[int, list[int]] = {}
        for row, (length, covered) in enumerate(zip(lengths, self.covered, strict=True)):
            count = self.recall.groupable(length, covered, self.unit, self.recent)
            if count >= max(1, least):
                by_count.setdefault(count, []).append(row)
        return by_count

    def extend(self, store: Store, due: dict[int, list[int]], device: torch.device) -> None:
        """Group the next entries of the rows that are `due`.

        device: where groups are made, and what stands for them lies; the store may lie elsewhere.
        """
        orders: dict[int, Tensor] = {}
        for count, rows in due.items():
            begins = [self.first + self.covered[r] for r in rows]
            movable = all(begin >= store.fixed(r) for begin, r in zip(begins, rows, strict=True))
            spans = [store.stretch(r, begin, begin + count) for begin, r in zip(begins, rows, strict=True)]
            received = None if self.received is None else self.received.oldest(rows, count)
            entries = Entries(torch.stack(spans).to(device), self.unit, movable, received)
            groups = self.recall.grouping.divide(entries)
            if groups.order is not None:
                orders.update(zip(rows, groups.order.to(store.device).unbind(0), strict=True))
            self._add(rows, begins, count, groups)
        if orders:
            starts = {r: self.first + self.covered[r] - orders[r].numel() for r in orders}
            store.reorder({r: (starts[r], order) for r, order in orders.items()})

    def _add(self, rows: list[int], begins: list[int], count: int, groups: Groups) -> None:
        new = groups.representatives
        table = self._room(new, max(self.counts[r] for r in rows) + new.shape[1])
        sizes = groups.sizes.int()
        begin = torch.tensor(begins, dtype=torch.int32, device=new.device).unsqueeze(1)
        starts = begin + sizes.cumsum(1, dtype=torch.int32) - sizes
        for i, r in enumerate(rows):
            at = slice(self.counts[r], self.counts[r] + new.shape[1])
            table.representatives[r, at], table.sizes[r, at], table.starts[r, at] = new[i], sizes[i], starts[i]
            self.counts[r] += new.shape[1]
            self.covered[r] += count
        if self.received is not None:
            self.received.forget(rows, count)
        self._mark_ends()

    def _mark_ends(self) -> None:
        """Say in the table where the groups of each row end now."""
        if self.table is not None:
            self.table = replace(self.table, ends=[self.first + n for n in self.covered])

    def _room(self, like: Tensor, groups: int) -> GroupTable:
        """The table with room for so many groups a row."""
        rows = len(self.counts)
        if self.table is None or self.table.sizes.shape[1] < groups:
            room = groups + (ROOM if self.table is not None else 0)
            fresh = GroupTable(
                like.new_zeros(rows, room, *like.shape[2:]),
                torch.zeros(rows, room, dtype=torch.int32, device=like.device),
                torch.zeros(rows, room, dtype=torch.int32, device=like.device),
                [self.first + n for n in self.covered],
                self.first,
            )
            if self.table is not None:
                held = self.table.sizes.shape[1]
                for new, old in zip(_tensors(fresh), _tensors(self.table), strict=True):
                    new[:, :held] = old
            self.table = fresh
        return self.table

    def dissolve(self) -> None:
        """No entry is in a group any more."""
        if self.received is not None:
            self.received.come_back(self.covered)
        self.covered, self.counts = [0] * len(self.covered), [0] * len(self.counts)
        self.table = None

    def keep(self, indices: list[Tensor]) -> None:
        """Only the entries `indices[r]` of each row stay, in no group."""
        self.dissolve()
        if self.received is not None:
            self.received.keep(indices, self.first)

    def select(self, sequences: Tensor, heads: int) -> None:
        """Keep, repeat or reorder sequences."""
        heads_of = torch.arange(heads, dtype=torch.int64, device=sequences.device)
        rows = (sequences.long().unsqueeze(1) * heads + heads_of).flatten()
        self.covered = [self.covered[r] for r in rows.tolist()]
        self.counts = [self.counts[r] for r in rows.tolist()]
        if self.table is not None:
            at = rows.to(self.table.sizes.device)
            self.table = replace(self.table, **{name: getattr(self.table, name)[at] for name in _NAMES})
            self._mark_ends()
        if self.received is not None:
            self.received.select(rows.to(self.received.sums.device))

    def wanted(self, seen: list[int], heads: int) -> list[int]:
        """Entries of groups that each row reads, where its sequence has `seen[b]` tokens."""
        return [self.recall.tokens(seen[r // heads], n, self.unit) for r, n in enumerate(self.covered)]

    def nbytes(self) -> int:
        """Bytes of what stands for the groups, of where they lie, and of what was received; not of room behind it."""
        return self.table_bytes() + (0 if self.received is None else self.received.nbytes())

    def table_bytes(self) -> int:
        """Bytes of what a choice reads: what stands for the groups, and where they lie."""
        if self.table is None:
            return 0
        per_group = self.table.representatives[0, 0].numel() * self.table.representatives.element_size() + 8
        return sum(self.counts) * per_group

    def allocated(self) -> int:
        """Bytes of everything allocated: also of the room behind the groups."""
        return sum(x.numel() * x.element_size() for x in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        received = [] if self.received is None else [self.received.sums]
        return received if self.table is None else [*received, *_tensors(self.table)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Index:
        twin = object.__new__(type(self))
        twin.__dict__.update(vars(self), covered=list(self.covered), counts=list(self.counts))
        if self.table is not None:
            twin.table = replace(self.table, **{n: getattr(self.table, n).clone() for n in _NAMES})
        twin.received = copy.deepcopy(self.received, memo)
        return twin


_NAMES = ("representatives", "starts", "sizes")


def _tensors(table: GroupTable) -> list[Tensor]:
    return [getattr(table, name) for name in _NAMES]
