"""The layout of a token decoder's layer: each row has a fixed number of places, and begins anew with each block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels.compact import Compactor, compact
from kvcompile.kernels.layout import View
from kvcompile.kernels.spec import Part, plain
from kvcompile.stores.base import Chosen, Move, Row, Stacked
from kvcompile.stores.ragged import RaggedStore, padded


class LocalStore(Stacked):
    """Keys and values `[B, H_kv, S, D]`, the entry of a place always there. A query at place s sees places 0..s.

    What an earlier block has left behind is never seen: the places up to that of a query have been written again.
    """

    def __init__(self, keys: Tensor, values: Tensor, filled: Tensor) -> None:
        self.keys, self.values, self.filled = keys, values, filled

    @classmethod
    def empty(cls, keys: Tensor, values: Tensor, places: int) -> LocalStore:
        """A store of so many `places` a row for new tokens like `keys [B, H_kv, Q, D]`."""
        batch, heads = keys.shape[:2]
        # what no query sees has no weight, but must be finite
        room = (
            keys.new_zeros(batch, heads, places, keys.shape[-1]),
            values.new_zeros(batch, heads, places, values.shape[-1]),
        )
        return cls(room[0], room[1], torch.zeros(batch, dtype=torch.int64, device=keys.device))

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        headroom: int,
        valid: Tensor | None = None,
        compactor: Compactor = compact,
    ) -> LocalStore:
        """Put `keys [B, H_kv, Q, D]`, `values` at the places `positions [B, Q]`, ascending; only those `valid`."""
        rows = torch.arange(len(positions), dtype=torch.int64, device=self.device).unsqueeze(1).expand_as(positions)
        at, reach = positions, positions + 1
        if valid is not None:
            rows, at, reach = rows[valid], positions[valid], reach.masked_fill(~valid, 0)
        for room, new in ((self.keys, keys), (self.values, values)):
            new = new.transpose(1, 2)
            room.transpose(1, 2)[rows, at] = new if valid is None else new[valid]
        self.filled = torch.where(reach.amax(1) > 0, reach.amax(1), self.filled)
        return self

    def attend(self, queries: Tensor, places: Tensor, scale: float) -> Tensor:
        """Attention of `queries [B, H_q, Q, D]` at `places [B, Q]`, whose entries are written: `[B, H_q, Q, D]`."""
        heads, count = self.heads, queries.shape[2]
        seen = torch.arange(self.keys.shape[2], dtype=torch.int64, device=places.device) <= places.unsqueeze(2)
        rows = torch.unflatten(queries, 1, (heads, -1))
        mask = seen[:, None, None].expand(-1, -1, rows.shape[2], -1, -1).flatten(2, 3)
        out = F.scaled_dot_product_attention(rows.flatten(2, 3), self.keys, self.values, attn_mask=mask, scale=scale)
        return torch.unflatten(out, 2, (-1, count)).flatten(1, 2)

    @property
    def lengths(self) -> list[int]:
        """Entries of each row that the current block has filled (sequence-major)."""
        return [n for n in self.filled.tolist() for _ in range(self.heads)]

    @property
    def parts(self) -> tuple[Part, ...]:
        """How a kernel must read `view()`."""
        return plain("ragged", self.keys.dtype)

    @property
    def chosen_parts(self) -> tuple[Part, ...]:
        """How a kernel must read chosen entries, of which there are none."""
        return self.parts

    @property
    def places(self) -> None:
        """Rows do not lie one behind the other."""
        return

    def view(self, chosen: Chosen | None = None) -> View:
        """A copy of what is held, for a kernel. Raises KvcompileError for a choice."""
        if chosen is not None:
            raise _all_or_none("a view of chosen entries")
        return RaggedStore.of(self.rows(), self.batch, self.heads, 0).view()

    def sequence(self, b: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Keys `[H_kv, n, D]`, values, places `[H_kv, n]` and row lengths of one sequence."""
        return padded(self.rows()[b * self.heads : (b + 1) * self.heads])

    def rows(self) -> list[Row]:
        """Each row's keys `[n, D]`, values and places, sequence-major."""
        at = torch.arange(self.keys.shape[2], dtype=torch.int64, device=self.device)
        flat = zip(self.keys.flatten(0, 1), self.values.flatten(0, 1), self.lengths, strict=True)
        return [(keys[:n], values[:n], at[:n]) for keys, values, n in flat]

    def select(self, sequences: Tensor) -> None:
        """Keep (or repeat, or reorder) sequences, in place."""
        self.keys, self.values, self.filled = (x[sequences] for x in (self.keys, self.values, self.filled))

    def keep(self, indices: list[Tensor], headroom: int, compactor: Compactor = compact) -> LocalStore:
        """Refused. Raises KvcompileError."""
        raise _all_or_none("a selection")

    def drop_last(self, count: int) -> None:
        """Refused. Raises KvcompileError."""
        raise _all_or_none("a crop")

    def moved(self, move: Move) -> LocalStore:
        """A store of the same entries whose every tensor is what `move` makes of this one's."""
        return LocalStore(move(self.keys), move(self.values), move(self.filled))

    def nbytes(self) -> int:
        """Bytes of the keys and values that the current blocks have filled."""
        entry = sum(x.shape[-1] * x.element_size() for x in (self.keys, self.values))
        return int(self.filled.sum()) * self.heads * entry

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        return [self.keys, self.values, self.filled]


def _all_or_none(got: str) -> KvcompileError:
    return KvcompileError("the entries of a block are kept together, until the next block begins", got)
