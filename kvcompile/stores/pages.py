"""Rows in pages of a pool: where entries lie, room for new ones, copy-on-write. It knows no keys and values."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvcompile.kernels.choose import Places
from kvcompile.kernels.compact import Arrays, Compactor, compact, placed
from kvcompile.stores.pool import HOST, PagePool, PageTable

F = TypeVar("F", bound=Callable[..., Any])
P = TypeVar("P", bound="Paged")

GROWTH = 8  # a pool that is full grows by this part of it, at least: it is copied then


class PagedRows:
    """Rows of any length in the pages of a pool that other `PagedRows` may share (see `fork`).

    Entry j of row r is slot `table[r, j // page] * page + j % page`. A page with other references is copied before it
    is written. When this object is gone, its pages return to the pool. `headroom`: tokens of reserve that a row has.
    Callers hold `pool.alone()` from the first slot they ask for until they have written or read it.
    """

    def __init__(self, pool: PagePool, rows: int, headroom: int = 0, table: PageTable | None = None) -> None:
        self.pool, self.headroom = pool, headroom
        self.lengths = [0] * rows
        self.counts = torch.zeros(rows, dtype=torch.long, device=self.where)
        self._adopt(table or PageTable.empty(rows, self.where))
        self._ahead: list[Tensor] = []  # slots [R] of the next tokens, the nearest one last
        self._reach = pool.page
        self._moves = pool.moves

    def _adopt(self, table: PageTable) -> None:
        self.table = table
        self.pool.tables.add(table)
        weakref.finalize(self, self.pool.left.append, table).atexit = False

    @classmethod
    def like(cls, rows: int, page: int, like: Mapping[str, Tensor], per: Mapping[str, int] | None = None) -> PagedRows:
        """Empty rows in a pool of their own, with one buffer for each tensor of `like [n, ...]` (see `PagePool`)."""
        return cls(PagePool(page, like, per), rows)

    @property
    def where(self) -> torch.device:
        """The device of the pages, wherever they lie just now."""
        return self.pool.device

    def slots(self, rows: Tensor, entries: Tensor) -> Tensor:
        """Where `entries [n]` of `rows [n]` lie, `[n]` int64 on the device of the pages."""
        page = self.pool.page
        return self.table.device[rows, entries // page].long() * page + entries % page

    def all_slots(self, sequence: range | None = None) -> Tensor:
        """Slots of all entries of some consecutive rows (default: of all), row after row."""
        chosen = sequence or range(len(self.lengths))
        counts = self.counts[chosen.start : chosen.stop]
        rows, entries = ranges(torch.zeros_like(counts), counts)
        return self.slots(rows + chosen.start, entries)

    @property
    def places(self) -> Places:
        """The table of pages."""
        return Places(self.table.device, self.pool.page)

    def step(self, headroom: int) -> Tensor:
        """Room for one more entry in every row: its slots `[R]`. The rows count as longer now."""
        if not self._ahead or self._moves != self.pool.moves:
            self._look_ahead(headroom)
        self.lengths = [n + 1 for n in self.lengths]
        self.counts += 1
        return self._ahead.pop()

    def _look_ahead(self, headroom: int) -> None:
        """Pages for the next tokens of all rows at once: rows reach the end of a page at different times."""
        start = torch.tensor(self.lengths, device=HOST, dtype=torch.int64)
        self._own(start, start + self._reach, headroom)
        ahead = torch.arange(self._reach, device=self.where, dtype=torch.int64)
        rows = torch.arange(len(self.lengths), device=self.where, dtype=torch.int64)
        slots = self.slots(rows.repeat(self._reach), (ahead.unsqueeze(1) + self.counts).flatten())
        self._ahead = list(slots.view(self._reach, -1).unbind(0))[::-1]
        self._reach, self._moves = self.pool.page, self.pool.moves

    def extend(self, added: list[int], headroom: int) -> Tensor:
        """Room for `added[r]` more entries in row r: their slots, row after row. The rows count as longer now."""
        start = self._longer(added, headroom)
        return self.slots(*ranges(start.to(self.where), self.counts))

    def receive(
        self,
        added: list[int],
        source: Arrays,
        headroom: int,
        compactor: Compactor = compact,
        kept: Tensor | None = None,
    ) -> None:
        """Add `added[r]` entries of row r of other arrays, the first ones or those `kept`, row after row.

        The arrays are those of the pool, in their order.
        """
        start = self._longer(added, headroom)
        kept = placed(added, None, self.where)[1] if kept is None else kept
        compactor(source, self.arrays(), kept, added, start.tolist())
        self._wrote(start)

    def _longer(self, added: list[int], headroom: int) -> Tensor:
        """Room for `added[r]` more entries in row r; how many there were `[R]`, on the host."""
        start = torch.tensor(self.lengths, device=HOST, dtype=torch.int64)
        stop = start + torch.tensor(added, device=HOST, dtype=torch.int64)
        self._own(start, stop, headroom)
        self._resize(stop.tolist())
        return start

    def arrays(self) -> Arrays:
        """What compaction moves: valid until there are other pages or another table."""
        pool = self.pool
        shared = tuple(pool.per[name] for name in pool.buffers)
        return Arrays(tuple(pool.buffers.values()), shared, table=self.table.device, page=pool.page)

    def _wrote(self, start: Tensor) -> None:
        """Remember that entries from `start[r]` (host) on were written, where somebody asks."""
        if self.pool.written is not None:
            pages = -(-torch.tensor(self.lengths, device=HOST, dtype=torch.int64) // self.pool.page)
            rows, columns = ranges(start // self.pool.page, pages)
            self.pool.wrote(self.table.host[rows, columns].long())

    def write(self, slots: Tensor, entries: Mapping[str, Tensor]) -> None:
        """Write `entries[name]` at `slots`; where tokens share an entry, slots are those of whole groups in order."""
        for name, new in entries.items():
            per = self.pool.per[name]
            self.pool.buffers[name][slots if per == 1 else slots[::per] // per] = new
        if self.pool.written is not None:
            self.pool.wrote(slots // self.pool.page)

    def read(self, slots: Tensor) -> dict[str, Tensor]:
        """The inverse of `write`: a copy of what is held at `slots`, where the pages lie."""
        at = slots.to(next(iter(self.pool.buffers.values())).device)
        return {
            name: buffer.index_select(0, at if (per := self.pool.per[name]) == 1 else at[::per] // per)
            for name, buffer in self.pool.buffers.items()
        }

    def _own(self, first: Tensor, stop: Tensor, headroom: int) -> None:
        """Make entries `first[r] : stop[r]` (host) of each row writable: pages there are, and nobody else's."""
        pool, table, page = self.pool, self.table, self.pool.page
        self.headroom = headroom
        needed = torch.where(stop > first, -(-stop // page), torch.zeros_like(stop))
        rows, columns = ranges(first // page, torch.minimum(needed, table.used))
        pages = table.host[rows, columns].long()
        copied = pool.shared(pages)
        new_rows, new_columns = ranges(table.used, needed)
        count = int(copied.sum()) + new_rows.numel()
        if count > pool.spare:
            with_room = int(((stop + headroom) // page - table.used).sum())
            pool.grow(max(count - pool.spare, with_room - pool.spare, pool.capacity // GROWTH))
        fresh = pool.allocate(count)
        if count > new_rows.numel():
            pool.copy(pages[copied], fresh[new_rows.numel() :])
            table.put(rows[copied], columns[copied], fresh[new_rows.numel() :])
            pool.release(pages[copied])
        table.put(new_rows, new_columns, fresh[: new_rows.numel()])
        table.used = torch.maximum(table.used, needed)

    def open(self, first: list[int]) -> None:
        """Make what is held from entry `first[r]` of each row on this owner's alone, so that it may be rewritten."""
        self._own(
            torch.tensor(first, device=HOST, dtype=torch.int64),
            torch.tensor(self.lengths, device=HOST, dtype=torch.int64),
            self.headroom,
        )
        self._ahead = []

    def keep(self, indices: list[Tensor], headroom: int, compactor: Compactor = compact) -> None:
        """Keep only the entries `indices[r]` (ascending) of each row; pages that empty are returned.

        Where tokens share an entry, whole groups of them stay or go. What stands before the first dropped entry of a
        row is not moved, so that its pages stay shared.
        """
        counts = [i.numel() for i in indices]
        old = torch.cat(indices).to(self.where)
        rows, new = placed(counts, None, self.where)
        stays = torch.zeros_like(self.counts).index_add_(0, rows, (old == new).long()).to(HOST)
        # pages that are written are this row's alone from here on, copies of shared ones included: rows cannot meet
        self._own(stays, torch.tensor(counts, device=HOST, dtype=torch.int64), headroom)
        compactor(self.arrays(), self.arrays(), old, counts)
        self.truncate(counts)
        self._wrote(stays)
        self._release_spare()

    def truncate(self, lengths: list[int]) -> None:
        """Forget what lies past `lengths[r]` entries of each row; its pages are returned, and those in reserve."""
        self._resize(lengths)
        page, table = self.pool.page, self.table
        needed = torch.tensor([-(-n // page) for n in lengths], device=HOST, dtype=torch.int64)
        rows, columns = ranges(needed, table.used)
        if rows.numel():
            pages = table.host[rows, columns].long()
            table.put(rows, columns, torch.full_like(pages, -1))
            table.used = torch.minimum(table.used, needed)
            self.pool.release(pages)

    def _resize(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.counts = torch.tensor(lengths, device=self.where, dtype=torch.int64)
        self._ahead = []

    def _release_spare(self) -> None:
        """Release memory where more pages are free than `headroom` tokens a row need, and some that spare a copy."""
        spare = sum((n + self.headroom) // self.pool.page for n in self.lengths) - int(self.table.used.sum())
        wanted = self.pool.used + max(0, spare)
        if self.pool.capacity > wanted + max(len(self.lengths), wanted // GROWTH):
            self.pool.shrink(wanted)

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder `rows [n]` (host): only the table changes."""
        self.truncate(self.lengths)
        table = self.table
        self.lengths = [self.lengths[int(r)] for r in rows]
        old = table.pages()
        table.choose(rows)
        self.pool.retain(table.pages())
        self.pool.release(old)
        self._resize(self.lengths)
        self._reach = 1  # who selects once may select at every token: pages ahead would be shared and dropped again
        self._release_spare()

    def fork(self) -> PagedRows:
        """The same rows once more: all pages are shared until one side writes them."""
        self.truncate(self.lengths)
        other = PagedRows(self.pool, len(self.lengths), self.headroom, self.table.copy())
        self.pool.retain(other.table.pages())
        other._resize(list(self.lengths))
        return other

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive: the whole pool, whoever else uses it, and the table."""
        return [*self.pool.tensors(), *self.table.tensors(), self.counts]


def rows_of(sequences: Tensor, heads: int) -> Tensor:
    """The rows of some sequences `[n]`, `heads` of each: `[n * heads]` on the host."""
    return (sequences.to(HOST).unsqueeze(1) * heads + torch.arange(heads, device=HOST, dtype=torch.int64)).flatten()


def alone(method: F) -> F:
    """Run a method of an owner of `PagedRows` (its `pages`) while no other thread uses their pool."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.pages.pool.alone():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


class Paged:
    """Base of what lies in `PagedRows`, `heads` rows a sequence: dropped, chosen and shared in place."""

    pages: PagedRows
    batch: int
    heads: int

    @property
    def lengths(self) -> list[int]:
        """Entries of each row (sequence-major)."""
        return self.pages.lengths

    @property
    def pools(self) -> list[PagePool]:
        """The one in whose pages it lies."""
        return [self.pages.pool]

    def moved(self: P, move: Callable[[Tensor], Tensor]) -> P:
        """Itself: pages move by pool."""
        return self

    def buffers(self) -> list[Tensor]:
        """The pages."""
        return list(self.pages.pool.buffers.values())

    def arrays(self) -> Arrays:
        """What compaction moves."""
        return self.pages.arrays()

    @alone
    def keep(self: P, indices: list[Tensor], headroom: int, compactor: Compactor = compact) -> P:
        """With only the entries `indices[row]` of each row, in place; pages that empty are freed."""
        self.pages.keep(indices, headroom, compactor)
        return self

    @alone
    def select(self, sequences: Tensor) -> None:
        """Keep (or repeat, or reorder) sequences: beam search and batch surgery."""
        self.batch = len(sequences)
        self.pages.select(rows_of(sequences, self.heads))

    @alone
    def fork(self: P) -> P:
        """An independent copy that shares all pages, except those that one of the two writes from now on."""
        other = copy.copy(self)
        other.pages = self.pages.fork()
        return other

    def __deepcopy__(self: P, memo: dict[int, Any]) -> P:
        return self.fork()

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive: all pages, free and shared ones included, table, reference counts."""
        return self.pages.tensors()


def ranges(starts: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs (r, j) with `starts[r] <= j < stops[r]`, row after row: two tensors `[n]` int64."""
    counts = (stops - starts).clamp(min=0)
    rows = torch.arange(counts.numel(), device=counts.device, dtype=torch.int64).repeat_interleave(counts)
    shift = starts - (counts.cumsum(0) - counts)
    return rows, torch.arange(rows.numel(), device=counts.device, dtype=torch.int64) + shift[rows]
