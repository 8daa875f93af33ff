"""Both layouts hold exactly what a list of rows would hold, and give memory back."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import LayerPlan
from kvcompile.runtime.layer import LayerCache
from kvcompile.stores.dense import DenseStore
from kvcompile.stores.ragged import RaggedStore

HEADS, DIM, VALUE_DIM = 2, 4, 6
HEADROOM = 8
PER_TOKEN = (DIM + VALUE_DIM) * 4

Entry = tuple[int, Tensor, Tensor]  # position, key, value


class Rows:
    """The naive model: a list of entries per row."""

    def __init__(self, batch: int) -> None:
        self.rows: list[list[Entry]] = [[] for _ in range(batch * HEADS)]
        self.seen = [0] * batch

    def append(self, keys: Tensor, values: Tensor, valid: Tensor) -> Tensor:
        """Returns the true positions `[B, Q]`."""
        positions = torch.tensor(self.seen).unsqueeze(1) + valid.long().cumsum(1) - 1
        for b in range(len(self.seen)):
            for t in valid[b].nonzero().flatten().tolist():
                for h in range(HEADS):
                    entry = (int(positions[b, t]), keys[b, h, t].clone(), values[b, h, t].clone())
                    self.rows[b * HEADS + h].append(entry)
            self.seen[b] += int(valid[b].sum())
        return positions

    def take(self, indices: list[Tensor]) -> None:
        self.rows = [[row[i] for i in index.tolist()] for row, index in zip(self.rows, indices, strict=True)]

    def select(self, sequences: list[int]) -> None:
        self.rows = [list(self.rows[b * HEADS + h]) for b in sequences for h in range(HEADS)]
        self.seen = [self.seen[b] for b in sequences]

    def drop_last(self, count: int) -> None:
        self.rows = [row[: len(row) - count] for row in self.rows]
        self.seen = [n - count for n in self.seen]


def storage(store: Any) -> int:
    """Bytes that the tensors really keep alive."""
    tensors = (store.keys, store.values, store.positions)
    return sum(x.untyped_storage().nbytes() for x in tensors)


def same(layer: LayerCache, expected: Rows) -> None:
    store = layer.held
    assert store.lengths == [len(row) for row in expected.rows]
    assert store.batch == len(expected.seen)
    assert store.nbytes() == sum(store.lengths) * PER_TOKEN
    assert store.allocated() == storage(store), "a view keeps more alive than is said"
    assert store.allocated() >= store.nbytes()
    for (keys, values, positions), row in zip(store.rows(), expected.rows, strict=True):
        assert positions.tolist() == [p for p, _, _ in row]
        if row:
            assert torch.equal(keys, torch.stack([k for _, k, _ in row]))
            assert torch.equal(values, torch.stack([v for _, _, v in row]))
    for b in range(store.batch):
        keys, _, positions, lengths = store.sequence(b)
        assert lengths == [len(expected.rows[b * HEADS + h]) for h in range(HEADS)]
        for h, n in enumerate(lengths):
            assert positions[h, :n].tolist() == [p for p, _, _ in expected.rows[b * HEADS + h]]
            assert bool((positions[h, n:] == -1).all())
            assert bool(keys.isfinite().all())


def layer_cache() -> LayerCache:
    return LayerCache(LayerPlan(0, HEADS, HEADS, DIM, 0, 1.0))


def poison(store: Any) -> None:
    """NaN in all the room behind the rows: whoever reads it fails."""
    held = [(k.clone(), v.clone(), p.clone()) for k, v, p in store.rows()]
    store.keys.fill_(float("nan")), store.values.fill_(float("nan")), store.positions.fill_(-9)
    for (k, v, p), (k0, v0, p0) in zip(store.rows(), held, strict=True):
        k.copy_(k0), v.copy_(v0)
        if p.stride(0):
            p.copy_(p0)


@pytest.mark.parametrize("padded", [False, True], ids=["dense-first", "ragged-first"])
@pytest.mark.parametrize("seed", range(15))
def test_random_operations_like_a_list_of_rows(seed: int, padded: bool) -> None:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch = rng.randint(1, 3)
    layer, naive = layer_cache(), Rows(batch)
    allow_pads = padded
    for turn in range(25):
        op = "append" if turn == 0 else rng.choice(["append", "step", "step", "keep", "select", "drop", "pads"])
        if op == "pads" and not allow_pads:
            allow_pads = turn > 12  # late padding turns a dense store ragged
            continue
        if op in ("append", "step", "pads"):
            count = 1 if op == "step" or (op == "pads" and turn % 2) else rng.randint(1, 12)
            keys = torch.randn(batch, HEADS, count, DIM, generator=g)
            values = torch.randn(batch, HEADS, count, VALUE_DIM, generator=g)
            valid = torch.ones(batch, count, dtype=torch.bool)
            if op == "pads" or (turn == 0 and padded):
                for b in range(batch):
                    valid[b, : rng.randint(0, count)] = False
            positions = naive.append(keys, values, valid)
            layer.append(keys, values, positions, None if valid.all() else valid, rng.choice([0, HEADROOM]))
        elif op == "keep":
            equal = rng.random() < 0.5 and min(map(len, naive.rows))
            count = rng.randint(1, min(map(len, naive.rows))) if equal else 0
            indices = []
            for row in naive.rows:
                n = count or rng.randint(0, len(row))
                indices.append(torch.randperm(len(row), generator=g)[:n].sort().values)
            naive.take(indices)
            layer.keep(indices, HEADROOM)
        elif op == "select":
            chosen = [rng.randrange(batch) for _ in range(rng.randint(1, 3))]
            batch = len(chosen)
            naive.select(chosen)
            layer.select(torch.tensor(chosen))
        elif op == "drop" and min(map(len, naive.rows)) > 1:
            naive.drop_last(1)
            layer.held.drop_last(1)
        poison(layer.held)
        same(layer, naive)


def fill(layer: LayerCache, batch: int, count: int, start: int = 0, valid: Tensor | None = None) -> None:
    positions = torch.arange(start, start + count).expand(batch, -1)
    layer.append(
        torch.randn(batch, HEADS, count, DIM), torch.randn(batch, HEADS, count, VALUE_DIM), positions, valid, HEADROOM
    )


@pytest.mark.parametrize("ragged", [False, True])
def test_decoding_moves_a_store_once_per_headroom(ragged: bool) -> None:
    layer = layer_cache()
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[0, :2] = False
    fill(layer, 2, 5, valid=valid if ragged else None)
    moves, where = 0, layer.held.keys.data_ptr()
    for i in range(10 * HEADROOM):
        fill(layer, 2, 1, 5 + i)
        now = layer.held.keys.data_ptr()
        moves, where = moves + (now != where), now
    assert 1 <= moves <= 10
    assert layer.held.allocated() <= (max(layer.held.lengths) + 2 * HEADROOM) * 2 * HEADS * (PER_TOKEN + 4)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_eviction_gives_memory_back(ragged: bool, per_head: bool) -> None:
    layer = layer_cache()
    valid = torch.ones(2, 400, dtype=torch.bool)
    valid[0, :2] = False
    fill(layer, 2, 400, valid=valid if ragged else None)
    layer.keep([torch.arange(10 + 5 * per_head * i) for i in range(4)], HEADROOM)
    store = layer.held
    assert storage(store) == store.allocated()
    assert store.allocated() <= (sum(store.lengths) + 4 * HEADROOM) * (PER_TOKEN + 4)
    assert isinstance(store, RaggedStore if ragged or per_head else DenseStore)


def test_selecting_one_sequence_gives_memory_back() -> None:
    for ragged in (False, True):
        layer = layer_cache()
        valid = torch.ones(3, 50, dtype=torch.bool)
        valid[0, :2] = False
        fill(layer, 3, 50, valid=valid if ragged else None)
        before = layer.held.allocated()
        layer.select(torch.tensor([1]))
        assert storage(layer.held) <= before / 2


def test_beam_reorder_forever_does_not_grow() -> None:
    for ragged in (False, True):
        layer = layer_cache()
        valid = torch.ones(3, 20, dtype=torch.bool)
        valid[0, :2] = False
        fill(layer, 3, 20, valid=valid if ragged else None)
        for i in range(100):
            layer.select(torch.tensor([(i + j) % 3 for j in range(3)]))
            fill(layer, 3, 1, 20 + i)
        room = layer.held.allocated() - layer.held.nbytes() - sum(layer.held.lengths) * 4
        assert room <= 3 * HEADS * 2 * HEADROOM * (PER_TOKEN + 4)


def test_half_precision_is_stored_as_such() -> None:
    layer = layer_cache()
    keys = torch.randn(1, HEADS, 3, DIM, dtype=torch.bfloat16)
    layer.append(keys, keys, torch.arange(3).unsqueeze(0), None, HEADROOM)
    assert layer.held.keys.dtype == torch.bfloat16
    assert layer.held.nbytes() == 2 * HEADS * 3 * DIM * 2


def test_transformers_may_not_write() -> None:
    with pytest.raises(KvcompileError, match="compiled model only, got an ordinary model"):
        layer_cache().update(torch.zeros(1), torch.zeros(1))
