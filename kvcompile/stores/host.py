"""Stores that lie in host memory between their uses, and how they come to the model's device and go back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from kvcompile.kernels.layout import MixedView, PagedView, Segment, View
from kvcompile.stores.base import Move, Store, overlap
from kvcompile.stores.pool import PagePool

T = TypeVar("T")
CPU = torch.device("cpu")


def shown(view: View, near: Move) -> View:
    """A copy, made by `near`, of the entries that a view with page tables shows, and of nothing else around them."""
    if isinstance(view, MixedView):
        return MixedView(tuple(_shown(s, near) for s in view.parts))
    return _shown(view, near)


def _shown(view: Segment, near: Move) -> PagedView:
    if not isinstance(view, PagedView):
        raise RuntimeError("only chosen entries come from host memory by themselves")
    device, page = view.table.device, view.page
    pages = torch.tensor([-(-n // page) for n in view.lengths], dtype=torch.int64, device=device)
    there = torch.arange(view.table.shape[1], dtype=torch.int64, device=device) < pages.unsqueeze(1)
    places = view.table[there].long()
    table = torch.zeros_like(view.table)
    table[there] = torch.arange(len(places), dtype=table.dtype, device=device)
    total = view.keys.shape[0] // page

    def copied(x: Tensor) -> Tensor:
        each = x.shape[0] // total  # entries of x a page
        return near(torch.unflatten(x[: total * each], 0, (total, each))[places].flatten(0, 1))

    others = ("positions", "key_scales", "value_scales", "bias")
    arrays: dict[str, Any] = {name: copied(x) for name in others if (x := getattr(view, name)) is not None}
    keys, wide = copied(view.keys), view.values.shape[1]
    values = keys[:, -wide:] if overlap(view.keys, view.values) else copied(view.values)
    return replace(view, keys=keys, values=values, table=near(table), counts=near(view.counts), **arrays)


@dataclass
class Coming(Generic[T]):
    """A copy on its way to the device, the tensors it is made of, and when it is complete (None: now)."""

    copy: T
    tensors: list[Tensor]
    arrived: Any = None


class Host:
    """The memory `home` beside a compute `device`, and the moves between the two.

    On CUDA stores lie in pinned memory and come on a stream of their own, beside what is computed; they go back, and
    come to any other device, while the host waits. On a CPU both are one memory: the moves are copies all the same,
    and what lies at home is known tensor by tensor.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.home = device, CPU
        self.pins = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.pins else None  # type: ignore[no-untyped-call]
        self._kept: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Host:
        return self  # a place, not a part of the caches that use it

    def holds(self, x: Tensor) -> bool:
        """Whether `x` lies at home."""
        return x.device.type == self.home.type if self.device.type != self.home.type else self._kept.get(id(x)) is x

    def away(self, x: Tensor) -> Tensor:
        """A copy of `x` at home, complete on return."""
        out = torch.empty(x.shape, dtype=x.dtype, device=self.home, pin_memory=self.pins).copy_(x)
        if self.device.type == self.home.type:
            self._kept[id(out)] = out
        return out

    def near(self, x: Tensor) -> Tensor:
        """A copy of `x` on the device, in the order of the current stream."""
        return torch.empty(x.shape, dtype=x.dtype, device=self.device).copy_(x, non_blocking=self.pins)

    def kept(self, x: Tensor) -> Tensor:
        """`x`, made at home by any operation, as `away` would have made it."""
        return x if (x.is_pinned() if self.pins else self.holds(x)) else self.away(x)

    def send(self, copy: Callable[[Move], T]) -> Coming[T]:
        """Begin to bring what `copy` makes with the move that it is given."""
        tensors: list[Tensor] = []

        def near(x: Tensor) -> Tensor:
            tensors.append(self.near(x))
            return tensors[-1]

        if self.stream is None:
            return Coming(copy(near), tensors)
        with torch.cuda.stream(self.stream):
            return Coming(copy(near), tensors, self.stream.record_event())

    def receive(self, coming: Coming[T]) -> T:
        """The copy, once what the current stream does next may use it."""
        if coming.arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(coming.arrived)
            for x in coming.tensors:  # the allocator must not hand it out again while this stream reads it
                x.record_stream(current)
        return coming.copy


@functools.cache
def beside(device: torch.device) -> Host:
    """Host memory beside a device: one stream for all that comes to it."""
    return Host(device)


class PagePoolResidency:
    """Where the buffers of a pool lie. Those who share it are its `users` while they need it on the device.

    home: what lay at home when the buffers were fetched; coming: a copy under way, of the buffers' `edition`.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.users: WeakSet[HostTransfer] = WeakSet()
        self.on_host = False
        self.home: dict[str, Tensor] | None = None
        self.coming: Coming[dict[str, Tensor]] | None = None
        self.edition = 0

    def prefetch(self, pool: PagePool) -> None:
        """Begin to bring the pages."""
        if self.on_host and (self.coming is None or self.edition != pool.edition):
            self.coming = self.host.send(lambda near: {name: near(x) for name, x in pool.buffers.items()})
            self.edition = pool.edition

    def fetch(self, pool: PagePool, user: HostTransfer) -> None:
        """The pages are on the device until the last user moves them to the host."""
        self.users.add(user)
        self.prefetch(pool)
        if self.on_host and self.coming is not None:
            self.home, pool.written, self.on_host = pool.buffers, [], False
            pool.buffers, self.coming = self.host.receive(self.coming), None

    def to_host(self, pool: PagePool, user: HostTransfer) -> None:
        """The pages are at home, once no other user needs them; only those that were written go back."""
        self.users.discard(user)
        if self.on_host or self.users:
            return
        if self.home is None or pool.written is None:
            pool.buffers = {name: self.host.away(x) for name, x in pool.buffers.items()}
        else:
            written = torch.cat([torch.zeros(0, dtype=torch.long, device="cpu"), *pool.written])
            pages = written.unique()  # type: ignore[no-untyped-call]
            for name, x in pool.buffers.items():
                pool.paged(name, self.home[name])[pages] = pool.paged(name, x)[pages.to(x.device)].to(self.host.home)
            pool.buffers = self.home
        self.home, pool.written, self.on_host = None, None, True

    def rehome(self, pool: PagePool) -> None:
        """What an operation made at home is made as `away` does."""
        if self.on_host:
            pool.buffers = {name: self.host.kept(x) for name, x in pool.buffers.items()}

    def tensors(self) -> list[Tensor]:
        """What is kept alive beside the buffers."""
        return [*(self.home or {}).values(), *(self.coming.tensors if self.coming else [])]


@dataclass(eq=False)
class HostTransfer:
    """Where one layer's store is, and what the copy at home has missed.

    parked: the store lies at home. home: what it was there when it was fetched. coming: a copy under way.
    appended: what the copy on the device got since; changed: it was also changed in other ways.
    """

    host: Host | None = None
    on_host: bool = False
    home: Store | None = None
    coming: Coming[Store] | None = None
    appended: list[tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, int]] = field(default_factory=list)
    changed: bool = False

    def _host(self, store: Store) -> Host:
        if self.host is None:
            self.host = beside(store.device)
        return self.host

    def prefetch(self, store: Store) -> None:
        """Begin to bring the `store`, where it is parked."""
        for pool in store.pools:
            with pool.alone():
                if pool.residency is not None:
                    pool.residency.prefetch(pool)
        if self.on_host:
            self.coming = self._host(store).send(lambda near: store.moved(near))

    def fetch(self, store: Store) -> Store:
        """The `store`, on the device."""
        for pool in store.pools:
            with pool.alone():
                if pool.residency is not None:
                    pool.residency.fetch(pool, self)
        if not self.on_host:
            return store
        coming = self.coming or self._host(store).send(lambda near: store.moved(near))
        self.on_host, self.home, self.coming = False, store, None
        return self._host(store).receive(coming)

    def to_host(self, store: Store) -> Store:
        """`store` at home; where it only grew, what was `appended` is appended to the copy there instead.

        Where it was there all along, what it has got since is made as `away` does.
        """
        host = self._host(store)
        for pool in store.pools:
            with pool.alone():
                pool.residency = pool.residency or PagePoolResidency(host)
                pool.residency.to_host(pool, self)
        if self.on_host:
            return self.rehome(store)
        if self.home is None or self.changed:
            host_store = store.moved(host.away)
        else:
            host_store = self.home
            for new, valid, headroom in self.appended if host_store is not store else ():
                keys, values, positions = (x.to(host.home) for x in new)
                host_store = host_store.append(
                    keys, values, positions, headroom, None if valid is None else valid.to(host.home)
                )
            host_store = host_store.moved(host.kept)
        self.on_host, self.home, self.appended, self.changed = True, None, [], False
        return host_store

    def rehome(self, store: Store) -> Store:
        """The store after an operation on it where it lies: what that made at home is made as `away` does."""
        if self.host is None or not self.on_host:
            return store
        for pool in store.pools:
            with pool.alone():
                if pool.residency is not None:
                    pool.residency.rehome(pool)
        return store.moved(self.host.kept)

    def spare(self, store: Store) -> list[Tensor]:
        """Tensors kept alive beside those of the `store`: copies, and what they were made of, also of its pages."""
        home = self.home.buffers() if self.home is not None else []
        pools = [x for pool in store.pools if pool.residency is not None for x in pool.residency.tensors()]
        return [*home, *(self.coming.tensors if self.coming else []), *pools]
