"""A pool of pages: buffers cut into pages of equal size, reference counts, a free list. It knows no rows.

Definition: PagedAttention, arXiv 2309.06180, section 4.2; copy-on-write, section 4.4.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

from kvcompile.kernels.compact import gather
from kvcompile.stores import hugepages

if TYPE_CHECKING:
    from kvcompile.stores.host import PagePoolResidency

HOST = torch.device("cpu")  # counts and lists are read by Python: they stay on the host


class PageTable:
    """Which pages hold a row, in order: `host [R, P]` int32, the first `used [R]` of each row; the others are -1.

    `device` is the same table where the pages lie (the very same tensor on a CPU).
    """

    def __init__(self, host: Tensor, used: Tensor, device: torch.device) -> None:
        self.used, self._where = used, device
        self._replace(host)

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> PageTable:
        """The table of rows that hold nothing."""
        host = torch.full((rows, 0), -1, dtype=torch.int32, device=HOST)
        return cls(host, torch.zeros(rows, dtype=torch.long, device=HOST), device)

    def pages(self) -> Tensor:
        """Every page named, as often as it is named, `[n]` int64."""
        return self.host[self._named()].long()

    def _named(self) -> Tensor:
        return torch.arange(self.host.shape[1], device=HOST, dtype=torch.int64) < self.used.unsqueeze(1)

    def put(self, rows: Tensor, columns: Tensor, pages: Tensor) -> None:
        """Name `pages [n]` (int64) in `rows [n]`, `columns [n]`."""
        if not pages.numel():
            return
        if int(columns.max()) >= self.host.shape[1]:
            self._widen(int(columns.max()) + 1)
        self.host[rows, columns] = pages.int()
        if self.device is not self.host:
            self.device[rows.to(self._where), columns.to(self._where)] = pages.int().to(self._where)

    def _widen(self, width: int) -> None:
        width += width // 4  # a wider table is a new one: not at every page
        wide = self.host.new_full((self.host.shape[0], width), -1)
        wide[:, : self.host.shape[1]] = self.host
        self._replace(wide)

    def renumber(self, numbers: Tensor) -> None:
        """Page p is now `numbers[p]`."""
        named, host = self._named(), self.host.clone()  # a view in use goes on with the old pages and the old table
        host[named] = numbers[host[named].long()]
        self._replace(host)

    def choose(self, rows: Tensor) -> None:
        """Keep, repeat or reorder `rows [n]`."""
        self.used = self.used[rows]
        self._replace(self.host[rows])

    def copy(self) -> PageTable:
        """A table of its own that names the same pages."""
        return PageTable(self.host.clone(), self.used.clone(), self._where)

    def _replace(self, host: Tensor) -> None:
        self.host, self.device = host, self._mirrored(host)

    def _mirrored(self, host: Tensor) -> Tensor:
        return host.to(self._where)

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        return [self.host, self.used] if self.device is self.host else [self.host, self.used, self.device]


class PagePool:
    """Named buffers `[pages * page / per, ...]` of the same pages; `per[name]` consecutive tokens share one entry.

    A page is free while nobody refers to it. Several owners may share a pool, in threads of their own: each has a table
    among `tables` and does everything inside `alone()`. `left` are the tables of owners that are gone: their pages are
    returned there, not by the owner's finalizer, which may run in the middle of something.

    Offloaded buffers lie elsewhere than on `device` now and then (see `residency`). `written`: pages written since they
    came (None: nobody asks, or other buffers were made); `edition`: how often that was.
    """

    def __init__(self, page: int, like: Mapping[str, Tensor], per: Mapping[str, int] | None = None) -> None:
        self.page, self.per = page, {name: (per or {}).get(name, 1) for name in like}
        self.buffers = {name: x.new_empty(0, *x.shape[1:]) for name, x in like.items()}
        self.device = next(iter(like.values())).device
        self.residency: PagePoolResidency | None = None
        self.written: list[Tensor] | None = None
        self.edition = 0
        self.references = torch.zeros(0, dtype=torch.int32, device=HOST)
        self._free = torch.zeros(0, dtype=torch.int32, device=HOST)  # a stack: the last `spare` are free
        self.spare = 0
        self.moves = 0  # how often pages were renumbered
        self.tables: WeakSet[PageTable] = WeakSet()
        self.left: deque[PageTable] = deque()
        self._lock = threading.RLock()

    @property
    def capacity(self) -> int:
        """Pages in all."""
        return self.references.numel()

    @property
    def used(self) -> int:
        """Pages that somebody refers to."""
        return self.capacity - self.spare

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive: pages, free ones included, reference counts, the free list."""
        return [*self.buffers.values(), self.references, self._free]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread uses the pool meanwhile, and pages of owners that are gone have been returned."""
        with self._lock:
            while self.left:
                table = self.left.popleft()
                self.tables.discard(table)
                self.release(table.pages())
            yield

    def allocate(self, count: int) -> Tensor:
        """`count` free pages `[count]` int64, each referred to once; the pool must have them (see `grow`)."""
        if count > self.spare:
            raise RuntimeError(f"{count} pages of {self.spare} free ones")
        pages = self._free[self.spare - count : self.spare].flip(0).long()
        self.spare -= count
        self.references[pages] = 1
        return pages

    def retain(self, pages: Tensor) -> None:
        """One more reference to each of `pages [n]`, as often as it is named."""
        self.references.index_add_(0, pages, torch.ones_like(pages, dtype=torch.int32))

    def release(self, pages: Tensor) -> None:
        """One reference less to each of `pages [n]`; what nobody refers to is free."""
        self.references.index_add_(0, pages, torch.full_like(pages, -1, dtype=torch.int32))
        gone = pages[self.references[pages] == 0].sort().values
        freed = gone[_first(gone)].int()
        self._free[self.spare : self.spare + freed.numel()] = freed.flip(0)
        self.spare += freed.numel()

    def shared(self, pages: Tensor) -> Tensor:
        """Which of `pages [n]`, all about to be written by one owner, must be copied first, `[n]` bool.

        Where a page is named k times and has no other reference, the first of the k may keep it.
        """
        references = self.references[pages]
        if not bool((references > 1).any()):
            return torch.zeros_like(pages, dtype=torch.bool)
        order = pages.argsort(stable=True)
        first = _first(pages[order])
        starts = first.nonzero().squeeze(1)
        counts = torch.diff(starts, append=starts.new_tensor([pages.numel()]))
        ours = counts.repeat_interleave(counts) == references[order]
        return torch.zeros_like(first).index_put((order,), (references[order] > 1) & ~(first & ours))

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole pages `sources [n]` over `targets [n]`."""
        for name, buffer in self.buffers.items():
            pages = self.paged(name, buffer)
            pages[targets.to(buffer.device)] = pages[sources.to(buffer.device)]
        self.wrote(targets)

    def grow(self, pages: int) -> None:
        """Add free pages, behind the others; what is there keeps its number."""
        old = self.capacity
        self._rebuild(old + pages, lambda new, buffer: new[:old].copy_(buffer))
        self.references = torch.cat((self.references, self.references.new_zeros(pages)))
        added = torch.arange(old, old + pages, dtype=torch.int32, device=HOST).flip(0)
        self._free = torch.cat((added, self._free))
        self.spare += pages

    def shrink(self, capacity: int) -> None:
        """Move the used pages together and let go of all memory past `capacity` pages; all tables are renumbered."""
        used = (self.references > 0).nonzero().squeeze(1)
        count = used.numel()
        capacity = max(capacity, count)
        self._rebuild(capacity, lambda new, buffer: gather(buffer, used.to(buffer.device), new[:count]))
        numbers = torch.full((self.capacity,), -1, dtype=torch.int32, device=HOST)
        numbers[used] = torch.arange(count, dtype=torch.int32, device=HOST)
        for table in self.tables:
            table.renumber(numbers)
        self.references = torch.cat((self.references[used], self.references.new_zeros(capacity - count)))
        self.spare = capacity - count
        self._free = torch.arange(capacity, dtype=torch.int32, device=HOST)
        self._free[: self.spare] = torch.arange(count, capacity, dtype=torch.int32, device=HOST).flip(0)
        self.moves += 1

    def _rebuild(self, capacity: int, fill: Callable[[Tensor, Tensor], object]) -> None:
        """New buffers of `capacity` pages, one after the other, so that little is held twice."""
        for name, old in self.buffers.items():
            new = hugepages.empty(old, capacity * self.page // self.per[name], *old.shape[1:])
            fill(self.paged(name, new), self.paged(name, old))
            self.buffers[name] = new
        self.written, self.edition = None, self.edition + 1

    def wrote(self, pages: Tensor) -> None:
        """Remember that `pages [n]` were written, where somebody asks."""
        if self.written is not None:
            self.written.append(pages.to(HOST))

    def paged(self, name: str, buffer: Tensor) -> Tensor:
        """The tensor `name` of the pool, `[pages, entries a page, ...]`."""
        entries = self.page // self.per[name]
        return buffer.view(buffer.shape[0] // entries, entries, *buffer.shape[1:])


def _first(ordered: Tensor) -> Tensor:
    """Where each run of equal numbers begins, `[n]` bool."""
    return torch.diff(ordered, prepend=ordered.new_tensor([-1])) != 0
