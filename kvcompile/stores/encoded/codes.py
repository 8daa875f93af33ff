"""The encoded part of a layer's rows: codes, scales and true positions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kvcompile.kernels.choose import Places
from kvcompile.kernels.codecs import Encoder, decode, encode
from kvcompile.kernels.compact import Arrays, Compactor, compact
from kvcompile.kernels.layout import PagedView, RaggedView, Segment
from kvcompile.kernels.spec import Part
from kvcompile.plan.storage import Codec
from kvcompile.stores import hugepages
from kvcompile.stores.base import Chosen, Move, Row, scattered, tabled
from kvcompile.stores.pool import PagePool


@dataclass(frozen=True)
class Format:
    """The number formats of keys and values, the dtype that they decode to, and what encodes them.

    latent: values are the channels of the keys from this one on, and have no codes of their own.
    """

    key: Codec
    value: Codec
    dtype: torch.dtype
    encoder: Encoder = field(default=encode, compare=False, repr=False)
    latent: int | None = None

    @property
    def block(self) -> int:
        """Tokens that share scales, so that they are written and dropped together."""
        return max(step(self.key), step(self.value))

    @property
    def steps(self) -> tuple[int, int, int, int, int]:
        """Tokens per entry of each tensor of `Codes`."""
        return 1, step(self.key), 1, step(self.value), 1


def step(codec: Codec) -> int:
    """Tokens that one entry of a codec's scales is for."""
    return codec.group if codec.axis == "channel" else 1


@dataclass(frozen=True)
class Codes:
    """Encoded entries, as `kvcompile.kernels.layout` says: codes and scales of keys and values, true positions."""

    keys: Tensor
    key_scales: Tensor | None
    values: Tensor | None
    value_scales: Tensor | None
    positions: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, positions: Tensor, format: Format) -> Codes:
        """Encode `keys [n, D]` and values; n is a multiple of the format's block."""
        codes, scales = format.encoder(keys, format.key)
        if format.latent is not None:
            return cls(codes, scales, None, None, positions)
        return cls(codes, scales, *format.encoder(values, format.value), positions)

    @property
    def shown(self) -> Tensor:
        """What a kernel is given as values: those of a latent are channels of the keys."""
        return self.keys if self.values is None else self.values

    @property
    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [x for x in self._all if x is not None]

    @property
    def _all(self) -> tuple[Tensor | None, ...]:
        return self.keys, self.key_scales, self.values, self.value_scales, self.positions

    def decoded(self, format: Format) -> Row:
        """Keys `[n, D]`, values and positions."""
        keys = decode(self.keys, self.key_scales, format.key, format.dtype)
        if self.values is None:
            return keys, keys[:, format.latent :], self.positions
        return keys, decode(self.values, self.value_scales, format.value, format.dtype), self.positions

    def room(self, tokens: int, format: Format) -> Codes:
        """Uninitialised tensors like these for so many tokens, a multiple of the block."""
        tensors = [
            None if x is None else hugepages.empty(x, tokens // n, *x.shape[1:])
            for x, n in zip(self._all, format.steps, strict=True)
        ]
        return Codes(*tensors)  # type: ignore[arg-type]

    def arrays(self, starts: Tensor, format: Format) -> Arrays:
        """What compaction moves, where row r begins at entry `starts[r]`."""
        steps = (n for x, n in zip(self._all, format.steps, strict=True) if x is not None)
        return Arrays(tuple(self.tensors), tuple(steps), starts)

    def packed(self, counts: list[int], format: Format) -> Arrays:
        """The same where row r is the next `counts[r]` entries, to be read only."""
        ends = torch.tensor(counts, device=self.keys.device, dtype=torch.int64).cumsum(0)
        return self.moved(Tensor.contiguous).arrays(
            ends - torch.tensor(counts, device=ends.device, dtype=torch.int64), format
        )

    def span(self, start: int, stop: int, format: Format) -> Codes:
        """The entries `start : stop`, whole blocks of them, as views."""
        cut = [None if x is None else x[start // n : stop // n] for x, n in zip(self._all, format.steps, strict=True)]
        return Codes(*cut)  # type: ignore[arg-type]

    def moved(self, move: Move) -> Codes:
        """What `move` makes of each tensor."""
        return Codes(*(None if x is None else move(x) for x in self._all))  # type: ignore[arg-type]


class CodeRows(Protocol):
    """What `QuantizedStore` asks of the encoded part of its rows, wherever it lies. Rows are sequence-major.

    Counts and indices are whole blocks of the format, counted from the row's first entry.
    """

    batch: int
    heads: int
    format: Format

    @property
    def lengths(self) -> list[int]:
        """Encoded tokens of each row."""
        ...

    @property
    def part(self) -> Part:
        """How a kernel must read it."""
        ...

    @property
    def pools(self) -> list[PagePool]:
        """The pools in whose pages it lies."""
        ...

    def segment(self, chosen: Chosen | None = None) -> Segment:
        """What a kernel reads: all entries, or whole blocks of them that are `chosen`, in pages of a block."""
        ...

    def append(self, counts: list[int], new: Codes, headroom: int, compactor: Compactor = compact) -> None:
        """Add the next `counts[row]` of the entries `new` to each row; new room holds `headroom` tokens more."""
        ...

    def row(self, row: int, start: int = 0) -> Row:
        """Decoded keys `[n, D]`, values and positions of one row, from entry `start` on."""
        ...

    def keep(self, indices: list[Tensor], headroom: int, compactor: Compactor = compact) -> CodeRows:
        """Only the entries `indices[row]` of each row, codes as they are."""
        ...

    def select(self, sequences: Tensor) -> None:
        """Keep (or repeat, or reorder) sequences, in place."""
        ...

    def nbytes(self) -> int:
        """Bytes of the codes and scales held (not of the room behind them)."""
        ...

    def moved(self, move: Move) -> CodeRows:
        """The same entries where every tensor is what `move` makes of this one's; pages move by pool."""
        ...

    def buffers(self) -> list[Tensor]:
        """The tensors that move between a device and host memory."""
        ...

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        ...


class RaggedCodes:
    """Encoded rows back to back; row r may grow from `starts[r]` to `starts[r] + rooms[r]`, multiples of the block."""

    def __init__(self, like: Codes, format: Format, batch: int, heads: int, rooms: list[int]) -> None:
        self.format, self.batch, self.heads = format, batch, heads
        self.rooms = [-(-room // format.block) * format.block for room in rooms]
        self.lengths = [0] * len(rooms)
        self.starts = [sum(self.rooms[:i]) for i in range(len(rooms))]
        self.codes = like.room(sum(self.rooms), format)
        self._begins = torch.tensor(self.starts, device=self.codes.keys.device, dtype=torch.int64)
        self._ends = self._begins.clone()

    @property
    def part(self) -> Part:
        """Ragged, in the format's codecs."""
        return Part("ragged", self.format.key, self.format.value)

    @property
    def pools(self) -> list[PagePool]:
        """None."""
        return []

    def segment(self, chosen: Chosen | None = None) -> RaggedView | PagedView:
        """What a kernel reads: all entries, or those `chosen`."""
        c = self.codes
        if chosen is not None:
            table = tabled(chosen, self._begins.device)
            arrays, scales = (c.keys, c.shown, c.positions), (c.key_scales, c.value_scales)
            return scattered(arrays, Places(self._begins), table, self.heads, self.format.block, scales)
        return RaggedView(
            c.keys,
            c.shown,
            c.positions,
            self.starts,
            self.lengths,
            self.batch,
            self.heads,
            self._begins,
            self._ends,
            c.key_scales,
            c.value_scales,
        )

    def append(self, counts: list[int], new: Codes, headroom: int, compactor: Compactor = compact) -> None:
        """Add the next `counts[row]` of the entries `new` to each row; a full row moves all, once."""
        lengths = [n + more for n, more in zip(self.lengths, counts, strict=True)]
        if any(n > room for n, room in zip(lengths, self.rooms, strict=True)):
            every = range(len(lengths))
            self._become(self._gathered(every, self._own(), self.batch, [n + headroom for n in lengths], compactor))
        places = torch.cat([torch.arange(n, dtype=torch.int64, device="cpu") for n in counts]).to(self._ends.device)
        compactor(new.packed(counts, self.format), self.arrays(), places, counts, self.lengths)
        self.lengths, self._ends = (
            lengths,
            self._ends + torch.tensor(counts, device=self._ends.device, dtype=torch.int64),
        )

    def arrays(self) -> Arrays:
        """What compaction moves."""
        return self.codes.arrays(self._begins, self.format)

    def _own(self) -> list[Tensor]:
        """All entries of each row."""
        return [torch.arange(n, device=self._begins.device, dtype=torch.int64) for n in self.lengths]

    def _gathered(
        self, rows: Sequence[int], indices: list[Tensor], batch: int, rooms: list[int], compactor: Compactor = compact
    ) -> RaggedCodes:
        """Codes whose rows are the entries `indices[i]` of row `rows[i]` of this one."""
        gathered = RaggedCodes(self.codes, self.format, batch, self.heads, rooms)
        counts = [len(index) for index in indices]
        source = self.codes.arrays(self._begins[list(rows)], self.format)
        compactor(source, gathered.arrays(), torch.cat(indices), counts)
        gathered.lengths, gathered._ends = (
            counts,
            gathered._begins + torch.tensor(counts, device=gathered._begins.device, dtype=torch.int64),
        )
        return gathered

    def _become(self, other: RaggedCodes) -> None:
        self.__dict__.update(other.__dict__)

    def row(self, row: int, start: int = 0) -> Row:
        """Decoded keys `[n, D]`, values and positions of one row, from entry `start` on."""
        first = self.starts[row]
        return self.codes.span(first + start, first + self.lengths[row], self.format).decoded(self.format)

    def keep(self, indices: list[Tensor], headroom: int, compactor: Compactor = compact) -> RaggedCodes:
        """New codes with only the entries `indices[row]` of each row, codes as they are."""
        rooms = [len(index) + headroom for index in indices]
        return self._gathered(range(len(indices)), indices, self.batch, rooms, compactor)

    def select(self, sequences: Tensor) -> None:
        """Keep (or repeat, or reorder) sequences, in place."""
        chosen = [int(b) for b in sequences]
        if chosen == list(range(self.batch)):
            return
        own, rows = self._own(), [b * self.heads + h for b in chosen for h in range(self.heads)]
        self._become(self._gathered(rows, [own[r] for r in rows], len(chosen), [self.rooms[r] for r in rows]))

    def nbytes(self) -> int:
        """Bytes of the codes and scales held (not of the room behind them)."""
        codes = self.codes.span(0, sum(self.lengths), self.format)
        return sum(x.numel() * x.element_size() for x in codes.tensors if x is not codes.positions)

    def moved(self, move: Move) -> RaggedCodes:
        """Codes of the same entries whose every tensor is what `move` makes of this one's."""
        moved = copy.copy(self)
        moved.codes, moved._begins, moved._ends = self.codes.moved(move), move(self._begins), move(self._ends)
        return moved

    def buffers(self) -> list[Tensor]:
        """All tensors."""
        return self.tensors()

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        return self.codes.tensors
