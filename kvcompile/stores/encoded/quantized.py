"""Rows whose older tokens are encoded: codes, and a residual in the model's own dtype."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from kvcompile.kernels.codecs import Encoder, encode
from kvcompile.kernels.compact import Compactor, compact
from kvcompile.kernels.layout import MixedView, View
from kvcompile.kernels.spec import Part
from kvcompile.plan.storage import Storage
from kvcompile.stores.base import Chosen, Move, Row, tabled
from kvcompile.stores.dense import DenseStore, of_rows
from kvcompile.stores.encoded.base import EncodedStore
from kvcompile.stores.encoded.codes import CodeRows, Codes, Format, RaggedCodes
from kvcompile.stores.encoded.paged import PagedCodes
from kvcompile.stores.encoded.scales import require_held
from kvcompile.stores.ragged import RaggedStore, padded


class QuantizedStore(EncodedStore):
    """Each row is its encoded entries, oldest first, then those of the residual, to which new tokens are appended.

    `flush` moves the residual's oldest tokens to the codes, in whole blocks, until less than a block more than the
    residual is left: after a prefill, and now and then while decoding. Before it attention sees the exact numbers.
    Until something is encoded there are no codes.
    """

    def __init__(
        self, storage: Storage, residual: DenseStore | RaggedStore, encoder: Encoder = encode, layer: int = 0
    ) -> None:
        self.storage, self.residual, self.layer = storage, residual, layer
        self.codes: CodeRows | None = None
        dtype = residual.keys.dtype
        self.format = Format(*storage.codecs(str(dtype).removeprefix("torch.")), dtype, encoder, residual.latent)

    @property
    def coded(self) -> list[CodeRows]:
        """The codes, once there are any."""
        return [] if self.codes is None else [self.codes]

    def flush(
        self, headroom: int, release: bool, compactor: Compactor = compact, concerned: list[bool] | None = None
    ) -> bool:
        """Encode what is older than the residual, all rows at once; `release`: give the room of a prefill back.

        concerned: of these sequences alone (None: of all); their rows have lengths of their own then.
        Returns whether anything was encoded. Raises KvcompileError for numbers that float16 scales cannot hold.
        """
        lengths = self.residual.lengths
        if max(lengths) < self.storage.residual + self.format.block:
            return False
        counts = [self.storage.encoded(n) for n in lengths]
        if concerned is not None and not all(concerned):
            counts = [n if concerned[r // self.heads] else 0 for r, n in enumerate(counts)]
            if not any(counts):
                return False
        keys, values, positions = self.residual.oldest(counts)
        new = Codes.of(keys, values, positions, self.format)
        require_held(new, (keys, values), self.format, self.storage.policy, self.layer)
        if self.codes is None:
            self.codes = self._opened(new, counts, headroom)
        self.codes.append(counts, new, headroom, compactor)
        if release:
            kept = [
                torch.arange(c, n, device=self.device, dtype=torch.int64) for c, n in zip(counts, lengths, strict=True)
            ]
            self.residual = self.residual.keep(kept, headroom, compactor)
        else:
            self.residual.shed(counts, compactor)
        return True

    def _opened(self, like: Codes, counts: list[int], headroom: int) -> CodeRows:
        """Empty codes for `counts[row]` entries."""
        if self.storage.page:
            return PagedCodes.like(like, self.format, self.batch, self.heads, self.storage.page)
        return RaggedCodes(like, self.format, self.batch, self.heads, [n + headroom for n in counts])

    def view(self, chosen: Chosen | None = None) -> View:
        """What a kernel reads: all entries, or those `chosen`; of encoded ones whole blocks that share scales.

        Raises KvcompileError for parts of such blocks.
        """
        if self.codes is None:
            return self.residual.view(chosen)
        if chosen is None:
            return MixedView((self.codes.segment(), self.residual.view()))
        old, new = tabled(chosen, self.device).split(self.encoded)
        return MixedView((self.codes.segment(old), self.residual.view(new)))

    @property
    def chosen_parts(self) -> tuple[Part, ...]:
        """How a kernel must read chosen entries: encoded ones as pages of a block, others as pages of one."""
        if self.codes is None:
            return self.residual.chosen_parts
        return replace(self.codes.part, layout="paged", page=self.format.block), *self.residual.chosen_parts

    def rows(self) -> list[Row]:
        """Each row's keys `[n, D]`, values and positions, sequence-major, decoded to the model's dtype."""
        return [self._row(r, 0, residual) for r, residual in enumerate(self.residual.rows())]

    def _row(self, row: int, start: int, residual: Row) -> Row:
        """The entries from `start` on of a row that ends in `residual`."""
        if self.codes is None:
            return residual
        keys, values, positions = zip(self.codes.row(row, start), residual, strict=True)
        return torch.cat(keys), torch.cat(values), torch.cat(positions)

    def sequence(self, b: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Keys `[H_kv, n, D]`, values, positions `[H_kv, n]` (zeros and -1 past a row's end) and row lengths."""
        rows, residuals = range(b * self.heads, (b + 1) * self.heads), self.residual.rows()
        return padded([self._row(r, 0, residuals[r]) for r in rows])

    def keep(self, indices: list[Tensor], headroom: int, compactor: Compactor = compact) -> QuantizedStore:
        """Keep only the entries `indices[row]` (ascending) of each row.

        Codes stay as they are where every token has its own scales; where tokens share them, up to the first block
        that loses one. What comes after goes back to the residual, to be encoded again by `flush`.
        """
        if self.codes is None:
            self.residual = self.residual.keep(indices, headroom, compactor)
            return self
        stay, rows = [], []
        for r, (index, residual) in enumerate(zip(indices, self.residual.rows(), strict=True)):
            old = self.encoded[r]
            inside = index[: int((index < old).sum())]
            count = self._untouched(inside, index.numel())
            stay.append(inside[:count])
            start = int(inside[count - 1]) + 1 if count and self.format.block == 1 else count
            rest = index[count:] - start
            keys, values, positions = self._row(r, start, residual)
            rows.append((keys[rest], values[rest], positions[rest]))
        self.codes = self.codes.keep(stay, headroom, compactor) if any(map(len, stay)) else None
        self.residual = of_rows(rows, self.batch, self.heads, headroom, self.format.latent)
        return self

    def stretch(self, row: int, start: int, stop: int) -> Tensor:
        """Keys `[stop - start, D]` of some entries of a row, decoded."""
        encoded, (residual, _, _) = self.encoded[row], self.residual.rows()[row]
        if self.codes is None or start >= encoded:
            return residual[start - encoded : stop - encoded]
        return torch.cat((self.codes.row(row, start)[0], residual))[: stop - start]

    def _untouched(self, inside: Tensor, total: int) -> int:
        """How many of a row's encoded entries `inside` stay encoded, where it keeps `total` entries."""
        block, most = self.format.block, self.storage.encoded(total)
        if block == 1:
            return min(inside.numel(), most)
        run = int(
            (inside == torch.arange(inside.numel(), device=inside.device, dtype=torch.int64)).long().cumprod(0).sum()
        )
        return min(run // block * block, most)

    def moved(self, move: Move) -> QuantizedStore:
        """A store of the same entries whose every tensor is what `move` makes of this one's; pages move by pool."""
        moved = copy.copy(self)
        moved.residual = self.residual.moved(move)
        moved.codes = None if self.codes is None else self.codes.moved(move)
        return moved
