"""Compaction: kept entries of every row of a store move to where they lie next, in plain torch, and what describes it.

The oracle of the generated kernels, which copy the same bytes, and what backends without generated kernels run.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError


@dataclass(frozen=True)
class CompactSpec:
    """One specialised compaction kernel: where rows lie before and after, and bytes and tokens of an entry per array.

    source, target: `dense`, `ragged` or `paged<tokens of a page>`. entries: `(bytes, tokens)` of each array, where
    tokens share an entry (scales per channel) more than one. in_place: source and target are the same arrays.
    """

    source: str
    target: str
    entries: tuple[tuple[int, int], ...]
    in_place: bool = False

    @property
    def name(self) -> str:
        """Readable and unique: `dense-ragged-256-256-4`, `paged32-16-256c32-16-4`."""
        sizes = "-".join(f"{size}c{tokens}" if tokens > 1 else str(size) for size, tokens in self.entries)
        return f"{self.source}-{'' if self.in_place else self.target + '-'}{sizes}"


@dataclass(frozen=True)
class Arrays:
    """All arrays of a store, and where in them entry j of row r (sequence-major) lies.

    - dense: `[B, H_kv or 1, capacity, ...]`, entry j of that row (of the sequence's only row, where heads share it);
    - ragged (`starts [R]` int64): `[T, ...]`, entry `starts[r] + j`;
    - paged (`table [R, P]` int32): `[pages * page, ...]`, entry `table[r, j // page] * page + j % page`.

    `tokens[i]` consecutive tokens of a row share one entry of `tensors[i]`; starts and pages are whole groups of them.
    """

    tensors: tuple[Tensor, ...]
    tokens: tuple[int, ...] = ()
    starts: Tensor | None = None
    table: Tensor | None = None
    page: int = 0

    @property
    def layout(self) -> str:
        """As a spec names it."""
        if self.table is not None:
            return f"paged{self.page}"
        return "dense" if self.starts is None else "ragged"

    @property
    def learns(self) -> bool:
        """Whether gradients go through it, which only the reference moves."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.tensors)

    @property
    def shared(self) -> tuple[int, ...]:
        """Tokens that share an entry of each array."""
        return self.tokens or (1,) * len(self.tensors)

    @property
    def entries(self) -> tuple[tuple[int, int], ...]:
        """Bytes and tokens of an entry of each array."""
        first = 3 if self.layout == "dense" else 1
        sizes = (prod(x.shape[first:]) * x.element_size() for x in self.tensors)
        return tuple(zip(sizes, self.shared, strict=True))

    def flat(self) -> list[Tensor]:
        """Each array as `[slots, ...]`, a view."""
        if self.layout != "dense":
            return list(self.tensors)
        return [x.view(prod(x.shape[:3]), *x.shape[3:]) for x in self.tensors]

    def sharing(self, rows: int) -> list[int]:
        """Of so many rows, how many neighbours share a row of each array: all heads, or none do."""
        return [rows // prod(x.shape[:2]) if self.layout == "dense" else 1 for x in self.tensors]

    def slots(self, rows: Tensor, entries: Tensor, sharing: int = 1) -> Tensor:
        """Where `entries [n]` of `rows [n]` lie in an array, counted in tokens: `[n]` int64."""
        if self.table is not None:
            return self.table[rows, entries // self.page].long() * self.page + entries % self.page
        if self.starts is not None:
            return self.starts[rows] + entries
        return rows // sharing * self.tensors[0].shape[2] + entries


class Compactor(Protocol):
    """A way to compact: the contract of `compact`."""

    def __call__(
        self, source: Arrays, target: Arrays, kept: Tensor, counts: list[int], first: list[int] | None = None
    ) -> None:
        """Entries `kept` of the rows of `source` become those from `first` on of the rows of `target`."""
        ...


def spec_of(source: Arrays, target: Arrays) -> CompactSpec:
    """The kernel that these need.

    Raises KvcompileError where the arrays of one are not those of the other, or entries do not lie one after the other.
    """
    for x in (*source.tensors, *target.tensors):
        if not x.is_contiguous():
            raise KvcompileError("compaction needs arrays that are contiguous", f"strides {x.stride()} of {x.shape}")
    if source.entries != target.entries:
        raise KvcompileError("compaction keeps bytes as they are", f"entries {source.entries} to {target.entries}")
    same = source.tensors[0].data_ptr() == target.tensors[0].data_ptr()
    return CompactSpec(source.layout, target.layout, target.entries, same)


def compact(source: Arrays, target: Arrays, kept: Tensor, counts: list[int], first: list[int] | None = None) -> None:
    """Copy the entries that stay: the i-th kept one of row r becomes entry `first[r] + i` of that row in `target`.

    Args:
        source: where they lie. Tokens that share entries (a scale) come in whole groups, in order.
        target: where they go. It may be `source`: what is where it belongs is not written then.
        kept: `[N]` int64, which entries stay, row after row; in place they ascend in each row.
        counts: how many of them belong to each row.
        first: the entry at which each row of the target begins, a multiple of what tokens share (default: 0).
    """
    in_place = spec_of(source, target).in_place
    rows, places = placed(counts, first, kept.device)
    if in_place:
        moved = kept != places
        rows, places, kept = rows[moved], places[moved], kept[moved]
    if not kept.numel():
        return
    here = {n: source.slots(rows, kept, n) for n in set(source.sharing(len(counts)))}
    there, begins = None, []
    if in_place or target.table is not None:
        there = target.slots(rows, places)
    else:  # the entries of a row lie one after the other
        numbers = torch.tensor(first or [0] * len(counts), device=kept.device, dtype=torch.int64)
        begins = target.slots(torch.arange(len(counts), device=kept.device, dtype=torch.int64), numbers).tolist()
    every = zip(source.flat(), source.sharing(len(counts)), target.flat(), target.shared, strict=True)
    for old, sharing, new, n in every:
        at = here[sharing] if n == 1 else here[sharing][::n] // n
        if there is not None:
            to = there if n == 1 else there[::n] // n
            new[to] = old if _all(at, len(old)) else old[at]  # a copy where both are the same arrays
            continue
        for begin, row, count in zip(begins, torch.split(at, [c // n for c in counts]), counts, strict=True):
            gather(old, row, new[begin // n : (begin + count) // n])


def _all(at: Tensor, count: int) -> bool:
    return at.numel() == count and bool((at == torch.arange(count, device=at.device, dtype=torch.int64)).all())


def gather(old: Tensor, at: Tensor, new: Tensor) -> None:
    """`old[at]` into `new`, with nothing in between, unless gradients are wanted."""
    if old.requires_grad or new.requires_grad:
        new.copy_(old[at])
    elif at.numel():
        torch.index_select(old, 0, at, out=new)


def placed(counts: list[int], first: list[int] | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and entry that each of `counts[r]` entries from `first[r]` on has, row after row: `[N]`, `[N]` int64."""
    numbers = torch.tensor([counts, first or [0] * len(counts)], device=device, dtype=torch.int64)
    rows = torch.arange(len(counts), device=device, dtype=torch.int64).repeat_interleave(numbers[0])
    shift = numbers[1] - (numbers[0].cumsum(0) - numbers[0])
    return rows, torch.arange(rows.numel(), device=device, dtype=torch.int64) + shift[rows]
