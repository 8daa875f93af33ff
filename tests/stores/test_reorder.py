"""Entries of a row change places where a grouping asks for it: key, value and position together, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from choosing import BATCH, DIM, HEADS, STORES, choice, filled, gathered
from torch import Tensor

from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.storage import PLAIN, Storage
from kvcompile.plan.structure import Latent
from kvcompile.runtime.cache import KVCache
from kvcompile.runtime.layer import LayerCache
from kvcompile.stores.base import Orders, Row, Store

every = pytest.mark.parametrize("name", STORES)


def rows_of(store: Store) -> list[Row]:
    """Copies of what each row holds."""
    return [(keys.clone(), values.clone(), at.clone()) for keys, values, at in store.rows()]


def orders_of(store: Store) -> Orders:
    """For two of the rows a stretch of what may move, backwards, with its last entry staying."""
    orders = {}
    for r in (0, 3):
        start, stop = store.fixed(r) + 1, store.lengths[r] - 1
        order = torch.arange(stop - start).flip(0)
        orders[r] = (start, torch.cat((order[1:], order[:1])))
    return orders


def reordered(row: Row, start: int, order: Tensor) -> Row:
    at = torch.cat((torch.arange(start), start + order, torch.arange(start + len(order), len(row[2]))))
    return row[0][at], row[1][at], row[2][at]


def same(got: list[Row], expected: list[Row]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True))


@every
def test_entries_move_with_all_that_is_theirs(name: str) -> None:
    """What is encoded stays, as do rows that nobody asked about."""
    layer, _, _ = filled(name, "sdpa", 1)
    before, orders = rows_of(layer.held), orders_of(layer.held)
    expected = [reordered(row, *orders[r]) if r in orders else row for r, row in enumerate(before)]
    layer.held.reorder(orders)
    assert same(rows_of(layer.held), expected)
    assert not same(expected, before)
    assert layer.held.lengths == [len(row[2]) for row in before]


@every
def test_attention_is_to_the_same_set(name: str) -> None:
    """All backends read positions beside their keys, so that the order of a row says nothing; also of a choice."""
    for backend in ("sdpa", "cpp"):
        layer, step, queries = filled(name, backend, 1)
        before = layer.attend(queries, step, 0)
        layer.held.reorder(orders_of(layer.held))
        torch.testing.assert_close(layer.attend(queries, step, 0), before, atol=2e-5, rtol=1e-4)
        chosen = choice(layer, 1)
        expected = gathered(layer, step, queries, chosen)
        got = layer.attend(queries, step, 0, chosen)
        torch.testing.assert_close(got, expected, atol=2e-3 if STORES[name].quantized else 2e-5, rtol=1e-3)


@every
def test_a_copy_stays_as_it_was(name: str) -> None:
    """Pages that a fork shares are copied before they are written."""
    layer, _, _ = filled(name, "sdpa", 1)
    fork = copy.deepcopy(layer)
    before, orders = rows_of(layer.held), orders_of(layer.held)
    layer.held.reorder(orders)
    assert same(rows_of(fork.held), before)
    after = rows_of(layer.held)
    fork.held.reorder(orders)
    assert same(rows_of(fork.held), after)


@every
def test_tokens_go_on_behind_what_was_reordered(name: str) -> None:
    layer, step, _ = filled(name, "sdpa", 1)
    layer.held.reorder(orders_of(layer.held))
    before, new = rows_of(layer.held), torch.randn(2, BATCH, HEADS, 1, DIM)
    layer.append(*new, step.positions + 1, None, 8)
    for r, (row, (keys, values, at)) in enumerate(zip(before, rows_of(layer.held), strict=True)):
        b, h = divmod(r, HEADS)
        assert same([(keys[:-1], values[:-1], at[:-1])], [row])
        assert torch.equal(keys[-1], new[0, b, h, 0])
        assert torch.equal(values[-1], new[1, b, h, 0])
        assert int(at[-1]) == int(step.positions[b, 0]) + 1


@pytest.mark.parametrize("storage", [PLAIN, Storage(page=8)], ids=["dense", "paged"])
def test_latent_rows_move_once(storage: Storage) -> None:
    """Values are channels of the keys: moved twice they would be back, or wrong."""
    latent = Latent(rank=10, frequencies=(0, 1, 2), kv_heads=2)
    plan = LayerPlan(0, 4, 1, DIM, 0, 1.0, storage=storage, latent=latent)
    layer: LayerCache = KVCache(Plan("llama", "float32", (plan,))).layers[0]
    rows = torch.randn(2, 1, 30, 16)
    layer.append(rows, rows, torch.arange(30).expand(2, -1), None, 8)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    layer.held.reorder({1: (4, order)})
    at = torch.cat((torch.arange(4), 4 + order, torch.arange(24, 30)))
    for (keys, values, positions), own, places in zip(
        layer.held.rows(), rows[:, 0], (torch.arange(30), at), strict=True
    ):
        assert torch.equal(keys, own[places])
        assert torch.equal(values, own[places][:, 6:])
        assert torch.equal(positions.long(), places)


@pytest.mark.parametrize("name", ["token", "channel", "token paged"])
def test_a_flush_encodes_what_was_reordered_in_its_order(name: str) -> None:
    """The residual of a quantized row, in the order it was given; positions go with it."""
    layer, _, _ = filled(name, "sdpa", 1)
    more = torch.randn(2, BATCH, HEADS, 40, DIM)
    last = int(max(at.max() for _, _, at in layer.held.rows())) + 1
    layer.append(*more, (last + torch.arange(40)).expand(BATCH, -1), None, 8)
    orders = orders_of(layer.held)
    layer.held.reorder(orders)
    before = rows_of(layer.held)
    assert layer.held.flush(8, False)
    after = rows_of(layer.held)
    assert [at.tolist() for _, _, at in after] == [at.tolist() for _, _, at in before]
    assert min(layer.held.fixed(r) for r in orders) > max(start for start, _ in orders.values())
    for (keys, _, _), (old, _, _) in zip(after, before, strict=True):
        torch.testing.assert_close(keys, old, atol=0.6, rtol=0)  # a step of 4 bits
