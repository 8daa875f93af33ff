"""How a prompt is cut into chunks: after so many real tokens of each sequence, wherever its padding is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """One pass over the columns `first : stop` of a prompt; `coming[b]` real tokens of a sequence are still to come."""

    first: int
    stop: int
    last: bool
    coming: list[int]


@dataclass(frozen=True)
class Prompt:
    """New tokens, their positions `[B, Q]`, and the padding mask `[B, past + Q]` (None: no padding).

    `ids`: ids `[B, Q]` or embeddings `[B, Q, hidden]`. Positions among images are of time, height, width: `[B, Q, 3]`.

    `places [B, Q]`: the column here of each column as it was given (None: the same).
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    places: Tensor | None = None

    def aligned(self) -> Prompt:
        """The same with every sequence's real tokens first, so that chunks cut it as they cut it alone."""
        batch, count = self.ids.shape[:2]
        mask = self.mask
        if mask is None or mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < count:
            return self  # of a wrong shape: the cache will say so
        padding = mask[:, -count:].eq(0)
        if not bool(padding.any()):
            return self
        order = padding.int().argsort(dim=1, stable=True)
        moved = torch.cat((mask[:, :-count], mask[:, -count:].gather(1, order)), 1)
        sequences = torch.arange(batch, device=order.device, dtype=torch.int64).unsqueeze(1)
        positions = self.positions.expand(batch, *self.positions.shape[1:])[sequences, order]
        return Prompt(self.ids[sequences, order], positions, moved, order.argsort(dim=1))

    def chunks(self, length: int) -> Iterator[Chunk]:
        """Passes over `length` columns each; the last one may be shorter."""
        batch, count = self.ids.shape[:2]
        for first in range(0, count, length):
            stop = min(first + length, count)
            after = count - stop
            coming = [after] * batch
            if self.mask is not None and after:
                coming = self.mask[:, -after:].ne(0).sum(1).tolist()
            yield Chunk(first, stop, stop == count, coming)

    def columns_holding(self, columns: Sequence[int]) -> list[int]:
        """Columns here, ascending, that hold any sequence's token of the given `columns`."""
        if self.places is None:
            return sorted(set(columns))
        return sorted(set(self.places[:, list(columns)].flatten().tolist()))

    def restored(self, results: Tensor, holding: Sequence[int], columns: Sequence[int]) -> Tensor:
        """`[B, len(columns), V]`, as the tokens were given, out of `results [B, len(holding), V]`."""
        index_of = {column: i for i, column in enumerate(holding)}
        if self.places is None:
            same = list(holding) == list(columns)
            return results if same else results[:, [index_of[column] for column in columns]]
        rows = [[index_of[c] for c in row] for row in self.places[:, list(columns)].tolist()]
        at = torch.tensor(rows, dtype=torch.long, device=results.device)
        return results[torch.arange(len(rows), dtype=torch.long, device=results.device).unsqueeze(1), at]


@dataclass(frozen=True)
class Sight:
    """Which later tokens of the same pass new ones see: those up to columns `ends [B, n]`.

    The newest columns are those of the pass. sliding: in layers with a sliding window alone.
    """

    ends: Tensor
    sliding: bool = False

    def until(self, positions: Tensor) -> Tensor:
        """The last position that each new token sees, by the `positions [B, Q]` of all of them."""
        count = positions.shape[1]
        before = self.ends.shape[1] - count
        return positions.gather(1, self.ends[:, before:] - before)


def ends_of_runs(marked: Tensor) -> Tensor:
    """For each column of `marked [B, Q]` the last column of its run of marked ones; its own, where it is not marked."""
    columns = torch.arange(marked.shape[1], dtype=torch.int64, device=marked.device)
    continues = marked & torch.nn.functional.pad(marked[:, 1:], (0, 1))
    ends = columns.masked_fill(continues, marked.shape[1])
    return ends.flip(1).cummin(1).values.flip(1)
