"""Encoded rows in pages: what `RaggedCodes` is, shared by forks and repeated sequences until they write."""

from __future__ import annotations

from torch import Tensor

from kvcompile.kernels.compact import Compactor, compact
from kvcompile.kernels.layout import PagedView
from kvcompile.kernels.spec import Part
from kvcompile.stores.base import Chosen, Row, scattered, tabled
from kvcompile.stores.encoded.codes import Codes, Format
from kvcompile.stores.pages import Paged, PagedRows, alone

NAMES = ("keys", "key_scales", "values", "value_scales", "positions")


class PagedCodes(Paged):
    """Codes, scales and true positions in the pages of one pool; a page is a multiple of the format's block."""

    def __init__(self, pages: PagedRows, format: Format, batch: int, heads: int) -> None:
        self.pages, self.format, self.batch, self.heads = pages, format, batch, heads

    @classmethod
    def like(cls, codes: Codes, format: Format, batch: int, heads: int, page: int) -> PagedCodes:
        """Empty codes for entries like `codes`, in pages of `page` tokens."""
        per = dict(zip(NAMES, format.steps, strict=True))
        return cls(PagedRows.like(batch * heads, page, _named(codes), per), format, batch, heads)

    @property
    def part(self) -> Part:
        """Paged, in the format's codecs."""
        return Part("paged", self.format.key, self.format.value, self.pages.pool.page)

    @alone
    def segment(self, chosen: Chosen | None = None) -> PagedView:
        """What a kernel reads: all entries, or those `chosen`."""
        pages, buffers = self.pages, self.pages.pool.buffers
        if chosen is not None:
            table = tabled(chosen, pages.where)
            arrays = buffers["keys"], buffers.get("values", buffers["keys"]), buffers["positions"]
            scales = buffers.get("key_scales"), buffers.get("value_scales")
            return scattered(arrays, pages.places, table, self.heads, self.format.block, scales)
        return PagedView(
            buffers["keys"],
            buffers.get("values", buffers["keys"]),
            buffers["positions"],
            pages.table.device,
            pages.lengths,
            self.batch,
            self.heads,
            pages.pool.page,
            pages.counts,
            buffers.get("key_scales"),
            buffers.get("value_scales"),
        )

    @alone
    def append(self, counts: list[int], new: Codes, headroom: int, compactor: Compactor = compact) -> None:
        """Add the next `counts[row]` of the entries `new` to each row."""
        self.pages.receive(counts, new.packed(counts, self.format), headroom, compactor)

    @alone
    def row(self, row: int, start: int = 0) -> Row:
        """Decoded keys `[n, D]`, values and positions of one row, from entry `start` on."""
        read = self.pages.read(self.pages.all_slots(range(row, row + 1))[start:])
        return Codes(*(read.get(name) for name in NAMES)).decoded(self.format)  # type: ignore[arg-type]

    def nbytes(self) -> int:
        """Bytes of the codes and scales held, not of the room behind them; shared entries count in every row."""
        pool, total = self.pages.pool, sum(self.lengths)
        sizes = {name: x[:0].element_size() * x[:1].numel() for name, x in pool.buffers.items() if name != "positions"}
        return sum(total // pool.per[name] * size for name, size in sizes.items())


def _named(codes: Codes) -> dict[str, Tensor]:
    tensors = {name: getattr(codes, name) for name in NAMES}
    return {name: x for name, x in tensors.items() if x is not None}
