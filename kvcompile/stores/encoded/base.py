"""Rows whose older entries are encoded, and whose newest ones are not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels.choose import Places
from kvcompile.kernels.compact import Compactor, compact
from kvcompile.kernels.spec import Part
from kvcompile.stores.base import Orders, Stretches
from kvcompile.stores.dense import DenseStore
from kvcompile.stores.encoded.codes import CodeRows
from kvcompile.stores.pool import PagePool
from kvcompile.stores.ragged import RaggedStore

S = TypeVar("S", bound="EncodedStore")


class EncodedStore(ABC):
    """What stores of encoded entries have in common: `coded` parts of each row, and behind them the `residual`.

    The residual is in the model's own dtype, and new tokens are appended to it. While nothing is encoded it is all.
    """

    residual: DenseStore | RaggedStore

    @property
    @abstractmethod
    def coded(self) -> Sequence[CodeRows]:
        """The encoded parts of the rows, in the order in which a kernel reads them."""

    @property
    def batch(self) -> int:
        """Sequences held."""
        return self.residual.batch

    @property
    def heads(self) -> int:
        """KV heads held."""
        return self.residual.heads

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.residual.device

    @property
    def encoded(self) -> list[int]:
        """Encoded tokens of each row (sequence-major)."""
        parts = [part.lengths for part in self.coded]
        if len(parts) == 1:
            return parts[0]
        return [sum(row) for row in zip(*parts, strict=True)] if parts else [0] * (self.batch * self.heads)

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each row (sequence-major)."""
        return [old + new for old, new in zip(self.encoded, self.residual.lengths, strict=True)]

    @property
    def parts(self) -> tuple[Part, ...]:
        """How a kernel must read it."""
        return (*(part.part for part in self.coded), *self.residual.parts)

    @property
    def places(self) -> Places | None:
        """Where its rows lie while nothing is encoded."""
        return None if self.coded else self.residual.places

    @property
    def pools(self) -> list[PagePool]:
        """Those of codes in pages."""
        return [pool for part in self.coded for pool in part.pools]

    def append(
        self: S,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        headroom: int,
        valid: Tensor | None = None,
        compactor: Compactor = compact,
    ) -> S:
        """Add `keys [B, H_kv, Q, D]`, `values`, at `positions [B, Q]`; only those `valid [B, Q]`."""
        self.residual = self.residual.append(keys, values, positions, headroom, valid, compactor)
        return self

    def rewrite(self, keys: Stretches) -> None:
        """Replace the keys of a stretch of some rows, in place. Raises KvcompileError where some are encoded."""
        if self.coded:
            raise KvcompileError(
                "only keys that are not encoded can be rewritten",
                f"up to {max(self.encoded)} encoded tokens a row",
                "store them in the model's own dtype",
            )
        self.residual.rewrite(keys)

    def revalue(self, values: Stretches) -> None:
        """Replace the values of a stretch of some rows that is not encoded, in place."""
        self.residual.revalue({row: (start - self.fixed(row), new) for row, (start, new) in values.items()})

    def fixed(self, row: int) -> int:
        """Encoded entries of a row, whose codes say where they lie."""
        return self.encoded[row]

    def reorder(self, orders: Orders) -> None:
        """Put entries of some rows that are not encoded in another order, in place."""
        encoded = self.encoded
        self.residual.reorder({r: (start - encoded[r], order) for r, (start, order) in orders.items()})

    def select(self, sequences: Tensor) -> None:
        """Keep (or repeat, or reorder) sequences, in place: beam search and batch surgery."""
        self.residual.select(sequences)
        for part in self.coded:
            part.select(sequences)

    def drop_last(self, count: int) -> None:
        """Forget the newest `count` tokens of every row. Raises KvcompileError where one of them is encoded."""
        if count > min(self.residual.lengths):
            raise KvcompileError(
                "only tokens that are not encoded yet can be taken back",
                f"{count} of {min(self.residual.lengths)}",
                "take back fewer, or start a new cache",
            )
        self.residual.drop_last(count)

    def nbytes(self) -> int:
        """Bytes of the codes, scales and plain numbers held (not of the room behind them)."""
        return self.residual.nbytes() + sum(part.nbytes() for part in self.coded)

    def buffers(self) -> list[Tensor]:
        """The tensors that move between a device and host memory."""
        return [*self.residual.buffers(), *(x for part in self.coded for x in part.buffers())]

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        return [*self.residual.tensors(), *(x for part in self.coded for x in part.tensors())]

    def allocated(self) -> int:
        """Bytes of everything allocated: codes, scales, plain numbers, positions, attention received, room."""
        return sum(x.numel() * x.element_size() for x in self.tensors())
