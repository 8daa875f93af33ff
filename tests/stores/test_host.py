"""Pools whose pages are in host memory: shared by forks, and made anew while a copy is on its way."""

from __future__ import annotations

import pytest
import torch

from kvcompile.stores.host import HostTransfer, beside
from kvcompile.stores.paged import PagedStore


@pytest.mark.parametrize("room", [4, 16])
def test_a_pool_is_on_the_device_while_any_guest_needs_it(room: int) -> None:
    """Forks in two threads: the first to park leaves the pages to the other, and what both wrote comes home.

    Where there is room, as single pages; else the pool is made anew.
    """
    host, keys = beside(torch.device("cpu")), torch.randn(1, 1, 6, 4)
    store = PagedStore.empty(keys, keys, 4)
    store.append(keys, keys, torch.arange(6)[None], room)
    first, second = HostTransfer(), HostTransfer()
    first.to_host(store)
    fork = store.fork()
    second.on_host = True
    for transfer, mine in ((first, store), (second, fork)):
        transfer.fetch(mine)
        assert not host.holds(mine.keys)
    new = {store: torch.full((1, 1, 1, 4), 7.0), fork: torch.full((1, 1, 1, 4), 9.0)}
    for mine, x in new.items():
        mine.append(x, x, torch.tensor([[6]]), 4)
    first.to_host(store)
    assert not host.holds(fork.keys)
    second.to_host(fork)
    assert host.holds(fork.keys)
    for mine, x in new.items():
        assert torch.equal(mine.rows()[0][0], torch.cat((keys[0, 0], x[0, 0])))


def test_pages_on_their_way_are_not_used_where_the_pool_was_made_anew_meanwhile() -> None:
    keys = torch.randn(1, 1, 6, 4)
    store, transfer = PagedStore.empty(keys, keys, 4), HostTransfer()
    store.append(keys, keys, torch.arange(6)[None], 4)
    transfer.to_host(store)
    transfer.prefetch(store)
    store.pages.pool.grow(3)
    transfer.fetch(store)
    assert store.pages.pool.buffers["keys"].shape[0] == store.pages.pool.capacity * 4
    assert torch.equal(store.rows()[0][0], keys[0, 0])
