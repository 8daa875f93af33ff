"""The attention that entries receive while they are in no group."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvcompile.kernels import reference
from kvcompile.kernels.layout import Queries, View
from kvcompile.kernels.spec import KernelSpec
from kvcompile.plan.recall import RECEIVED_BYTES

ROOM = 64  # entries of room behind those of the longest row


class Received:
    """What the last entries of each row, those behind its groups, have received: `sums [R, room]`, float32.

    Summed over the queries since an entry came, and over the query heads of its KV head. `counts[r]`: entries of a row.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.sums = torch.zeros(rows, 0, dtype=torch.float32, device=device)
        self.counts = [0] * rows

    def add(self, columns: Tensor, ends: list[int], counts: list[int]) -> None:
        """Add to the `counts[r]` entries of a row the last ones of the first `ends[r]` of `columns [R, n]`."""
        self._hold(counts)
        if len(set(ends)) == len(set(counts)) == 1:
            self.sums[:, : counts[0]] += columns[:, ends[0] - counts[0] : ends[0]]
            return
        for row, of_row, end, count in zip(self.sums, columns, ends, counts, strict=True):
            row[:count] += of_row[end - count : end]

    def oldest(self, rows: list[int], count: int) -> Tensor:
        """What the first `count` entries of some rows have received, `[len(rows), count]`."""
        return self.sums[rows, :count]

    def forget(self, rows: list[int], count: int) -> None:
        """The first `count` entries of some rows have gone into groups."""
        moved = self.sums[rows].roll(-count, 1)
        moved[:, -count:] = 0
        self.sums[rows] = moved
        for r in rows:
            self.counts[r] -= count

    def come_back(self, counts: list[int]) -> None:
        """`counts[r]` entries have left the groups of a row: they have received nothing since."""
        self._hold([old + new for old, new in zip(self.counts, counts, strict=True)])
        for row, count in zip(self.sums, counts, strict=True):
            row.copy_(row.roll(count))

    def keep(self, indices: list[Tensor], first: int) -> None:
        """Only the entries `indices[r]` of each row stay, of which the first `first` are none of ours."""
        for r, (row, index) in enumerate(zip(self.sums, indices, strict=True)):
            kept = row[index[first:] - first]
            self.counts[r] = len(kept)
            row.zero_()[: len(kept)] = kept

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows."""
        self.sums = self.sums[rows]
        self.counts = [self.counts[r] for r in rows.tolist()]

    def nbytes(self) -> int:
        """Bytes of what is held, not of the room behind it."""
        return sum(self.counts) * RECEIVED_BYTES

    def _hold(self, counts: list[int]) -> None:
        self.counts = counts
        if max(counts) > self.sums.shape[1]:
            self.sums = torch.nn.functional.pad(self.sums, (0, max(counts) + ROOM - self.sums.shape[1]))


def column_sums(queries: Queries, view: View, spec: KernelSpec, lengths: list[int]) -> Tensor:
    """What the `lengths[r]` entries of each row of a view receive, `[R, longest]`, float32: where no kernel does."""
    sums = torch.zeros(len(lengths), max(lengths), dtype=torch.float32, device=queries.states.device)
    reference.column_sums(queries, view, replace(spec, scores=True), sums)
    return sums
