"""What a layer asks of the store that holds its keys and values, in whatever layout its rows lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels.choose import EntryTable, Places
from kvcompile.kernels.compact import Compactor, compact
from kvcompile.kernels.layout import PagedView, View
from kvcompile.kernels.spec import Part
from kvcompile.stores.pool import PagePool

POSITION_TYPE = torch.int32

Row = tuple[Tensor, Tensor, Tensor]  # keys [n, D], values, positions
Chosen = Tensor | list[Tensor] | EntryTable  # ascending entries of each row: `[R, n]`, or one tensor `[n_r]` a row
Stretches = dict[int, tuple[int, Tensor]]  # by row: a stretch's first entry, and numbers for its entries, `[n, D]`
Orders = dict[int, tuple[int, Tensor]]  # by row: a stretch's first entry, and the order its entries get, `[n]` int64
Move = Callable[[Tensor], Tensor]


class Store(Protocol):
    """Keys, values and true positions of one layer. Row `b * heads + h` belongs to sequence b and KV head h.

    What changes the rows returns the store that holds them afterwards: itself, or one in another layout.
    `headroom`: tokens of room behind a row where memory is taken for it. `compactor`: what copies entries that stay.
    """

    @property
    def batch(self) -> int:
        """Sequences held."""
        ...

    @property
    def heads(self) -> int:
        """KV heads held."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each row."""
        ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """How a kernel must read `view()`."""
        ...

    @property
    def chosen_parts(self) -> tuple[Part, ...]:
        """How a kernel must read `view(chosen)`."""
        ...

    @property
    def places(self) -> Places | None:
        """Where its rows lie; None: not in one memory."""
        ...

    @property
    def pools(self) -> list[PagePool]:
        """The pools in whose pages some of it lies."""
        ...

    def view(self, chosen: Chosen | None = None) -> View:
        """What a kernel reads: all entries, or of each row only those `chosen`.

        Chosen ones stay where they are: the view is a table of their places, and nothing but that is made for it.
        """
        ...

    def rows(self) -> list[Row]:
        """Each row's keys `[n, D]`, values and positions, decoded where they are encoded."""
        ...

    def sequence(self, b: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Keys `[H_kv, n, D]`, values, positions `[H_kv, n]` (zeros and -1 past a row's end) and row lengths."""
        ...

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        headroom: int,
        valid: Tensor | None = None,
        compactor: Compactor = compact,
    ) -> Store:
        """Add `keys [B, H_kv, Q, D]`, `values`, at true `positions [B, Q]`; only those `valid [B, Q]`."""
        ...

    def keep(self, indices: list[Tensor], headroom: int, compactor: Compactor = compact) -> Store:
        """Keep only the entries `indices[row]` (ascending) of each row; the memory of the others is freed."""
        ...

    def flush(
        self, headroom: int, release: bool, compactor: Compactor = compact, concerned: list[bool] | None = None
    ) -> bool:
        """Encode what is older than the residual; whether anything was. `release`: give the room of a prefill back.

        concerned: of which sequences (None: of all).
        """
        ...

    def rewrite(self, keys: Stretches) -> None:
        """Replace the keys of a stretch of some rows, in place. Raises KvcompileError where any are encoded."""
        ...

    def revalue(self, values: Stretches) -> None:
        """Replace the values of a stretch of some rows, in place; none of its entries may be encoded (`fixed`)."""
        ...

    def stretch(self, row: int, start: int, stop: int) -> Tensor:
        """Keys `[stop - start, D]` of some entries of a row, decoded where they are encoded."""
        ...

    def fixed(self, row: int) -> int:
        """Entries of a row, its first ones, that cannot change places: encoded ones."""
        ...

    def reorder(self, orders: Orders) -> None:
        """Put entries of some rows in another order, in place: entry `start + i` becomes what `start + order[i]` was.

        Positions go with their entries.
        """
        ...

    def select(self, sequences: Tensor) -> None:
        """Keep (or repeat, or reorder) sequences, in place: beam search and batch surgery."""
        ...

    def drop_last(self, count: int) -> None:
        """Forget the newest `count` tokens of every row. Raises KvcompileError where one of them is encoded."""
        ...

    def moved(self, move: Move) -> Store:
        """A store of the same entries whose every tensor is what `move` makes of this one's; pages move by pool."""
        ...

    def buffers(self) -> list[Tensor]:
        """The tensors that move between a device and host memory: all but the books of pools."""
        ...

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        ...

    def nbytes(self) -> int:
        """Bytes of the keys and values held, not of the room behind them; shared entries count in every row."""
        ...

    def allocated(self) -> int:
        """Bytes of everything allocated: keys, values, positions, room."""
        ...


class Plain(ABC):
    """What stores in the model's own dtype have in common: nothing is encoded, and where they do not say so nothing
    lies in pages.
    """

    @property
    def pools(self) -> list[PagePool]:
        """None."""
        return []

    @abstractmethod
    def rows(self) -> list[Row]:
        """Each row's keys `[n, D]`, values and positions, as views."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""

    def buffers(self) -> list[Tensor]:
        """All tensors."""
        return self.tensors()

    def allocated(self) -> int:
        """Bytes of everything allocated: keys, values, positions, room."""
        return sum(x.numel() * x.element_size() for x in self.tensors())

    def flush(
        self, headroom: int, release: bool, compactor: Compactor = compact, concerned: list[bool] | None = None
    ) -> bool:
        """Nothing is encoded: False."""
        return False

    def stretch(self, row: int, start: int, stop: int) -> Tensor:
        """Keys `[stop - start, D]` of some entries of a row."""
        return self.rows()[row][0][start:stop]

    def fixed(self, row: int) -> int:
        """None."""
        return 0

    def reorder(self, orders: Orders) -> None:
        """Put entries of some rows in another order, in place."""
        rows = self.rows()
        for row, (start, order) in orders.items():
            keys, values, positions = rows[row]
            own = (keys, positions) if overlap(keys, values) else (keys, values, positions)
            for x in own:
                stretch = x[start : start + order.numel()]
                stretch.copy_(stretch[order])

    def rewrite(self, keys: Stretches) -> None:
        """Replace the keys of a stretch of some rows, in place."""
        rows = self.rows()
        for row, (start, new) in keys.items():
            rows[row][0][start : start + len(new)] = new

    def revalue(self, values: Stretches) -> None:
        """Replace the values of a stretch of some rows, in place."""
        rows = self.rows()
        for row, (start, new) in values.items():
            rows[row][1][start : start + len(new)] = new


class Stacked(Plain):
    """Of these the ones whose rows are one tensor, `keys [B, H_kv, S, D]`."""

    keys: Tensor

    @property
    def batch(self) -> int:
        """Sequences held."""
        return self.keys.shape[0]

    @property
    def heads(self) -> int:
        """KV heads held."""
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.keys.device


def overlap(keys: Tensor, values: Tensor) -> bool:
    """Whether values are channels of the keys."""
    return keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


def tabled(chosen: Chosen, device: torch.device) -> EntryTable:
    """What is chosen, as a table on a device."""
    if not isinstance(chosen, EntryTable):
        return EntryTable.of(chosen, device)
    if chosen.entries.device == device:
        return chosen
    return EntryTable(chosen.entries.to(device), chosen.lengths, chosen.counts.to(device))


def scattered(
    arrays: tuple[Tensor, Tensor, Tensor],
    places: Places,
    chosen: EntryTable,
    heads: int,
    page: int = 1,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> PagedView:
    """Chosen entries of flat keys, values and positions, whose rows lie at `places`, as pages of `page`.

    Raises KvcompileError where tokens share scales (`page` of them) and some of them are chosen without the others.
    """
    lengths, counts = chosen.lengths, chosen.counts
    slots = places.of(chosen) if page == 1 else places.slots(_blocks(chosen, page)) // page
    return PagedView(*arrays, slots.contiguous(), lengths, len(lengths) // heads, heads, page, counts, *scales)


def _blocks(chosen: EntryTable, page: int) -> Tensor:
    """The first entry of each of the whole blocks that are chosen, `[R, blocks]`."""
    lengths, counts = chosen.lengths, chosen.counts
    most = max(lengths) // page
    first, last = (chosen.entries[:, i::page][:, :most] for i in (0, page - 1))
    past = torch.arange(most, dtype=torch.int64, device=first.device) >= (counts // page).unsqueeze(1)
    whole = (first % page == 0) & (last - first == page - 1)  # entries ascend: those between are the block's
    if any(n % page for n in lengths) or not bool((whole | past).all()):
        raise KvcompileError(
            f"{page} tokens share scales: of encoded entries only whole blocks of {page} can be chosen",
            f"{sum(lengths)} entries that are not",
            "choose the other entries of these blocks too",
        )
    return first
