"""The paged layout: every (sequence, KV head) row lies in pages of a pool that forks and repeated sequences share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcompile.kernels.choose import Places
from kvcompile.kernels.compact import Arrays, Compactor, compact, placed
from kvcompile.kernels.layout import PagedView
from kvcompile.kernels.spec import Part, plain
from kvcompile.stores.base import POSITION_TYPE, Chosen, Orders, Plain, Row, Stretches, scattered, tabled
from kvcompile.stores.pages import Paged, PagedRows, alone, ranges


class PagedStore(Paged, Plain):
    """Keys `[pages * page, D]`, values, true positions `[pages * page]` in the model's dtype; rows as in `PagedRows`.

    `latent`: values are the channels of the keys from this one on, and have no memory of their own.
    Copies (`fork`, `copy.deepcopy`) and repeated sequences (`select`) share pages until one of them writes there.
    """

    def __init__(self, pages: PagedRows, batch: int, heads: int, latent: int | None = None) -> None:
        self.pages, self.batch, self.heads, self.latent = pages, batch, heads, latent

    @classmethod
    def empty(cls, keys: Tensor, values: Tensor, page: int, latent: int | None = None) -> PagedStore:
        """A store shaped for new tokens like `keys [B, H_kv, Q, D]`, in pages of `page` tokens."""
        batch, heads = keys.shape[:2]
        like = {"keys": keys[0, 0]} if latent is not None else {"keys": keys[0, 0], "values": values[0, 0]}
        like["positions"] = torch.empty(0, dtype=POSITION_TYPE, device=keys.device)
        return cls(PagedRows.like(batch * heads, page, like), batch, heads, latent)

    @property
    def keys(self) -> Tensor:
        """All pages of keys, `[pages * page, D]`."""
        return self.pages.pool.buffers["keys"]

    @property
    def values(self) -> Tensor:
        """All pages of values, `[pages * page, D_v]`."""
        return self._values(self.pages.pool.buffers)

    def _values(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["values"] if self.latent is None else arrays["keys"][:, self.latent :]

    @property
    def positions(self) -> Tensor:
        """All pages of true positions, `[pages * page]`."""
        return self.pages.pool.buffers["positions"]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.pages.where

    @alone
    def append(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        headroom: int,
        valid: Tensor | None = None,
        compactor: Compactor = compact,
    ) -> PagedStore:
        """Add `keys [B, H_kv, Q, D]`, `values`, at `positions [B, Q]`; only those `valid [B, Q]`.

        Where each row gets one token, its slot is known ahead; pages are looked for once every `page` tokens.
        """
        rows, count = self.batch * self.heads, keys.shape[2]
        at = positions.to(POSITION_TYPE)
        if count == 1 and valid is None:
            new = {"keys": keys.reshape(rows, -1), "positions": at.repeat_interleave(self.heads, 0).flatten()}
            if self.latent is None:
                new["values"] = values.reshape(rows, -1)
            self.pages.write(self.pages.step(headroom), new)
            return self
        arrays = (keys, at.unsqueeze(1)) if self.latent is not None else (keys, values, at.unsqueeze(1))
        added, kept = [count] * rows, None
        if valid is not None:
            real = valid.repeat_interleave(self.heads, 0)
            added, kept = real.sum(1).tolist(), real.nonzero()[:, 1]
        self.pages.receive(added, Arrays(tuple(x.contiguous() for x in arrays)), headroom, compactor, kept)
        return self

    @alone
    def view(self, chosen: Chosen | None = None) -> PagedView:
        """What a kernel reads: all entries, or those `chosen`."""
        pages = self.pages
        if chosen is not None:
            table = tabled(chosen, self.device)
            return scattered((self.keys, self.values, self.positions), pages.places, table, self.heads)
        return PagedView(
            self.keys,
            self.values,
            self.positions,
            pages.table.device,
            pages.lengths,
            self.batch,
            self.heads,
            pages.pool.page,
            pages.counts,
        )

    @property
    def places(self) -> Places:
        """The table of its pages."""
        return self.pages.places

    @property
    def parts(self) -> tuple[Part, ...]:
        """How a kernel must read it."""
        return plain("paged", self.keys.dtype, self.pages.pool.page)

    @property
    def chosen_parts(self) -> tuple[Part, ...]:
        """How a kernel must read chosen entries: as pages of one."""
        return plain("paged", self.keys.dtype, 1)

    @alone
    def rows(self) -> list[Row]:
        """Each row's keys `[n, D]`, values and positions (copies), sequence-major."""
        arrays = self.pages.read(self.pages.all_slots())
        whole = (arrays["keys"], self._values(arrays), arrays["positions"])
        return list(zip(*(torch.split(x, self.lengths) for x in whole), strict=True))

    @alone
    def sequence(self, b: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Keys `[H_kv, n, D]`, values, positions `[H_kv, n]` (zeros and -1 past a row's end) and row lengths."""
        rows = range(b * self.heads, (b + 1) * self.heads)
        lengths = self.lengths[rows.start : rows.stop]
        counts = self.pages.counts[rows.start : rows.stop]
        arrays, at = self.pages.read(self.pages.all_slots(rows)), ranges(torch.zeros_like(counts), counts)

        def padded(x: Tensor, fill: int) -> Tensor:
            out = x.new_full((self.heads, max(lengths), *x.shape[1:]), fill)
            out[at] = x
            return out

        return padded(arrays["keys"], 0), padded(self._values(arrays), 0), padded(arrays["positions"], -1), lengths

    @alone
    def stretch(self, row: int, start: int, stop: int) -> Tensor:
        """Keys `[stop - start, D]` of some entries of a row, copied."""
        entries = torch.arange(start, stop, dtype=torch.int64, device=self.pages.counts.device)
        return self.pages.read(self.pages.slots(torch.full_like(entries, row), entries))["keys"]

    @alone
    def reorder(self, orders: Orders) -> None:
        """Put entries of some rows in another order, in place; pages that others share are copied first."""
        pages = self.pages
        pages.open([orders[r][0] if r in orders else n for r, n in enumerate(self.lengths)])
        rows = torch.cat([torch.full_like(order, r) for r, (_, order) in orders.items()])
        old = torch.cat([start + order for start, order in orders.values()])
        steps = [torch.arange(len(order), dtype=torch.int64, device=order.device) for _, order in orders.values()]
        new = torch.cat([start + step for (start, _), step in zip(orders.values(), steps, strict=True)])
        pages.write(pages.slots(rows, new), pages.read(pages.slots(rows, old)))

    @alone
    def rewrite(self, keys: Stretches) -> None:
        """Replace the keys of a stretch of some rows, in place; pages that others share are copied first."""
        self._replace("keys", keys)

    @alone
    def revalue(self, values: Stretches) -> None:
        """Replace the values of a stretch of some rows, in place; pages that others share are copied first."""
        self._replace("values", values)

    def _replace(self, what: str, stretches: Stretches) -> None:
        pages = self.pages
        pages.open([stretches[r][0] if r in stretches else n for r, n in enumerate(self.lengths)])
        starts, new = zip(*stretches.values(), strict=True)
        of, entries = placed([len(x) for x in new], list(starts), self.device)
        rows = torch.tensor(list(stretches), dtype=torch.int64, device=self.device)[of]
        pages.write(pages.slots(rows, entries), {what: torch.cat(new)})

    @alone
    def drop_last(self, count: int) -> None:
        """Forget the newest `count` tokens of every row."""
        self.pages.truncate([n - count for n in self.lengths])

    def nbytes(self) -> int:
        """Bytes of the keys and values held, not of the room behind them; shared entries count in every row."""
        tensors = (self.keys,) if self.latent is not None else (self.keys, self.values)
        per_token = sum(x.shape[-1] * x.element_size() for x in tensors)
        return sum(self.lengths) * per_token

    @alone
    def allocated(self) -> int:
        """Bytes of everything allocated."""
        return sum(x.numel() * x.element_size() for x in self.tensors())
