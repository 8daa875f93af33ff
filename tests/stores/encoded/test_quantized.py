"""Encoded rows lose no entry, are encoded once, keep what is not touched to the bit, and give memory back."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels import codecs, reference, sdpa
from kvcompile.kernels.cpp import build
from kvcompile.kernels.dispatch import BUILT_IN, CPP
from kvcompile.kernels.layout import Queries
from kvcompile.kernels.spec import KernelSpec
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.storage import Codec, Storage
from kvcompile.runtime.cache import KVCache
from kvcompile.runtime.layer import LayerCache
from kvcompile.stores.encoded.quantized import QuantizedStore
from kvcompile.stores.factory import expected_parts

HEADS, DIM, HEADROOM = 2, 8, 8
CHANNEL = Storage(Codec("int8", "channel", 4), Codec("int8", "token", 4), residual=4)
TOKEN = Storage(Codec("int8", "token"), Codec("float8", "token"), residual=3)
KEYS_ONLY = Storage(Codec("int8", "channel", 8), None, residual=0)
kinds = pytest.mark.parametrize("storage", [CHANNEL, TOKEN, KEYS_ONLY], ids=["channel", "token", "keys only"])

Entry = tuple[int, Tensor, Tensor]


def layer_cache(storage: Storage, encode: codecs.Encoder = codecs.encode) -> LayerCache:
    return LayerCache(LayerPlan(0, HEADS, HEADS, DIM, 0, 1.0, storage=storage), encode)


def fill(layer: LayerCache, batch: int, count: int, start: int = 0, valid: Tensor | None = None) -> tuple[Tensor, ...]:
    """Appends random entries; positions count the real tokens only."""
    keys, values = torch.randn(2, batch, HEADS, count, DIM)
    real = torch.ones(batch, count, dtype=torch.bool) if valid is None else valid
    positions = start + real.long().cumsum(1) - 1
    layer.append(keys, values, positions, valid, HEADROOM)
    return keys, values, positions


def poison(store: QuantizedStore) -> None:
    """NaN or garbage in all room behind codes and residual: whoever reads it shows."""
    parts: list[Any] = [store.residual] + ([] if store.codes is None else [store.codes])
    for part in parts:
        held = [tuple(x.clone() for x in row) for row in part.rows()] if part is store.residual else None
        if held is None:
            spans = [part.codes.span(at, at + n, part.format) for at, n in zip(part.starts, part.lengths, strict=True)]
            whole = [[x.clone() for x in span.tensors] for span in spans]
            for x in part.codes.tensors:
                x.copy_(torch.full_like(x, 165 if x.dtype == torch.uint8 else -9, dtype=torch.float32))
            for span, old in zip(spans, whole, strict=True):
                for x, y in zip(span.tensors, old, strict=True):
                    x.copy_(y)
            continue
        part.keys.fill_(float("nan")), part.values.fill_(float("nan"))
        for (keys, values, _), (k, v, _) in zip(part.rows(), held, strict=True):
            keys.copy_(k), values.copy_(v)


def same(store: QuantizedStore, expected: list[list[Entry]], within: float) -> None:
    assert store.lengths == [len(row) for row in expected]
    for (keys, values, positions), row in zip(store.rows(), expected, strict=True):
        assert positions.tolist() == [p for p, _, _ in row]
        if row:
            torch.testing.assert_close(keys, torch.stack([k for _, k, _ in row]), atol=within, rtol=0)
            torch.testing.assert_close(values, torch.stack([v for _, _, v in row]), atol=4 * within, rtol=0)
    for b in range(store.batch):
        keys, values, positions, lengths = store.sequence(b)
        assert lengths == [len(expected[b * HEADS + h]) for h in range(HEADS)]
        assert bool(keys.isfinite().all())
        assert bool(values.isfinite().all())
        for h, n in enumerate(lengths):
            assert bool((positions[h, n:] == -1).all())


@kinds
@pytest.mark.parametrize("seed", range(12))
def test_random_operations_like_a_list_of_rows(seed: int, storage: Storage) -> None:
    """Append, decode, select, evict, flush in any order: every entry is there, in order, within the codec's error."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch = rng.randint(1, 3)
    layer, seen = layer_cache(storage), [0] * batch
    naive: list[list[Entry]] = [[] for _ in range(batch * HEADS)]
    for turn in range(40):
        op = "append" if turn == 0 else rng.choice(["append", "step", "step", "flush", "flush", "keep", "select"])
        if op in ("append", "step"):
            count = 1 if op == "step" else rng.randint(1, 30)
            keys, values = torch.randn(2, batch, HEADS, count, DIM, generator=g)
            valid = torch.ones(batch, count, dtype=torch.bool)
            if seed % 2 and op == "append":
                for b in range(batch):
                    valid[b, : rng.randint(0, count)] = False
            at = torch.tensor(seen).unsqueeze(1) + valid.long().cumsum(1) - 1
            for r in range(batch * HEADS):
                b, h = divmod(r, HEADS)
                naive[r] += [(int(at[b, t]), keys[b, h, t], values[b, h, t]) for t in valid[b].nonzero().flatten()]
            seen = [n + int(valid[b].sum()) for b, n in enumerate(seen)]
            layer.append(keys, values, at, None if valid.all() else valid, rng.choice([0, HEADROOM]))
        elif op == "keep":
            indices = [
                torch.randperm(len(row), generator=g)[: rng.randint(len(row) // 2, len(row))].sort().values
                for row in naive
            ]
            naive = [[row[int(i)] for i in index] for row, index in zip(naive, indices, strict=True)]
            layer.keep(indices, HEADROOM)
        elif op == "select":
            chosen = [rng.randrange(batch) for _ in range(rng.randint(1, 3))]
            naive = [list(naive[b * HEADS + h]) for b in chosen for h in range(HEADS)]
            seen, batch = [seen[b] for b in chosen], len(chosen)
            layer.select(torch.tensor(chosen))
        else:
            release = rng.random() < 0.5
            layer.flush(HEADROOM, release)
            assert all(n < storage.residual + storage.block for n in layer.held.residual.lengths)
        store: Any = layer.held
        poison(store)
        same(store, naive, 0.12)  # steps of 6 / 255, encoded again up to ten times; e4m3 has 1/16
        assert all(n % storage.block == 0 for n in store.encoded)
        encoded = store.codes.nbytes() if store.codes else 0
        assert encoded == sum(sum(c.nbytes(n, DIM) for c in storage.codecs("float32")) for n in store.encoded)
        assert store.nbytes() == encoded + sum(store.residual.lengths) * 2 * DIM * 4
        assert store.allocated() == sum(x.untyped_storage().nbytes() for x in store.tensors())


@kinds
def test_attention_reads_codes_and_residual_in_one_softmax(storage: Storage) -> None:
    """Every backend that reads the view sees the rows that the store says it holds."""
    layer = layer_cache(storage)
    fill(layer, 2, 30)
    layer.flush(HEADROOM, True)
    _, _, at = fill(layer, 2, 1, 30)
    store: Any = layer.held
    poison(store)
    spec = KernelSpec(store.parts, 2, DIM, DIM, DIM**-0.5)
    assert store.parts == expected_parts(storage, "dense", "float32")
    queries = Queries(torch.randn(2, 2 * HEADS, 1, DIM), at)
    expected = []
    for r, (keys, values, _) in enumerate(store.rows()):
        b, h = divmod(r, HEADS)
        mine = queries.states[b, 2 * h : 2 * h + 2, 0].double()
        expected.append((mine @ keys.double().T * spec.scale).softmax(-1) @ values.double())
    for attend in (reference.attend, sdpa.attend):
        got = attend(queries, store.view(), spec).squeeze(2).view(2 * HEADS, 2, DIM)
        torch.testing.assert_close(got, torch.stack(expected).float(), atol=1e-5, rtol=1e-5)


def test_a_token_of_its_own_scale_never_changes_again() -> None:
    """Per-token codes are picked, not made anew: what stays is the same to the bit after any number of evictions."""
    layer = layer_cache(TOKEN)
    fill(layer, 1, 60)
    layer.flush(HEADROOM, True)
    before = [dict(zip(p.tolist(), k, strict=True)) for k, _, p in layer.held.rows()]
    for keep in (50, 30, 10):
        indices = [torch.randperm(n)[:keep].sort().values for n in layer.held.lengths]
        layer.keep(indices, HEADROOM)
        layer.flush(HEADROOM, True)
        assert layer.held.encoded == [TOKEN.encoded(keep)] * HEADS
    for (keys, _, positions), old in zip(layer.held.rows(), before, strict=True):
        for p, k in list(zip(positions.tolist(), keys, strict=True))[: TOKEN.encoded(10)]:
            assert torch.equal(k, old[p])


def test_blocks_before_the_first_lost_entry_stay_as_they_are() -> None:
    layer = layer_cache(CHANNEL)
    fill(layer, 1, 44)
    layer.flush(HEADROOM, True)
    store: Any = layer.held
    before = [row[0].clone() for row in store.rows()]
    assert store.encoded == [40, 40]
    whole, without = torch.arange(44), torch.cat((torch.arange(21), torch.arange(22, 44)))
    layer.keep([whole, without], HEADROOM)
    assert layer.held.encoded == [40, 20], "five blocks of four come before entry 21"
    assert torch.equal(layer.held.rows()[0][0], before[0])
    assert torch.equal(layer.held.rows()[1][0], before[1][without])
    layer.flush(HEADROOM, True)
    assert layer.held.encoded == [40, 36]
    assert torch.equal(layer.held.rows()[0][0], before[0])
    assert torch.equal(layer.held.rows()[1][0][:20], before[1][:20])


@kinds
def test_decoding_flushes_whole_blocks_now_and_then(storage: Storage) -> None:
    layer = layer_cache(storage)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :7] = False
    fill(layer, 2, 20, valid=valid)
    layer.flush(HEADROOM, True)
    flushes = 0
    for t in range(100):
        fill(layer, 2, 1, 20 + t)
        flushes += t % 20 == 19 and layer.flush(HEADROOM, False)
    assert flushes == 5
    assert all(n % storage.block == 0 for n in layer.held.encoded)
    assert layer.held.lengths == [120, 120, 113, 113]


@kinds
def test_beam_reorder_forever_does_not_grow(storage: Storage) -> None:
    layer = layer_cache(storage)
    fill(layer, 3, 40)
    layer.flush(HEADROOM, True)
    for i in range(60):
        layer.select(torch.tensor([(i + j) % 3 for j in range(3)]))
        fill(layer, 3, 1, 40 + i)
        layer.flush(HEADROOM, False)
    store: Any = layer.held
    room = store.allocated() - store.nbytes() - sum(store.lengths) * 4
    rows = 3 * HEADS
    assert room <= rows * (2 * HEADROOM + 3 * storage.block) * (2 * DIM * 4 + 4)


def test_an_encoded_token_cannot_be_dropped_as_the_newest() -> None:
    layer = layer_cache(CHANNEL)
    fill(layer, 1, 22)
    layer.flush(HEADROOM, True)
    store: Any = layer.held
    store.drop_last(4)
    assert store.lengths == [18, 18]
    with pytest.raises(KvcompileError, match="not encoded yet"):
        store.drop_last(3)


def test_half_precision_decodes_to_half_precision() -> None:
    layer = layer_cache(CHANNEL)
    keys = torch.randn(1, HEADS, 20, DIM, dtype=torch.bfloat16)
    layer.append(keys, keys, torch.arange(20).unsqueeze(0), None, HEADROOM)
    layer.flush(HEADROOM, True)
    decoded, _, _ = layer.held.rows()[0]
    assert decoded.dtype == torch.bfloat16
    torch.testing.assert_close(decoded, keys[0, 0], atol=0.05, rtol=0.02)
    assert layer.held.nbytes() == HEADS * CHANNEL.nbytes(20, DIM, "bfloat16")


@pytest.mark.skipif(build.available() is not None, reason="no C++ compiler here")
@pytest.mark.parametrize("page", [0, 8])
@kinds
def test_the_encoder_of_cpp_leaves_the_same_bytes(storage: Storage, page: int) -> None:
    """After a padded prompt, a selection that sends entries back to the residual, and two more encodings."""
    calls: list[Codec] = []

    def counted(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor | None]:
        calls.append(codec)
        return CPP.encode(x, codec)

    made = [layer_cache(replace(storage, page=page), encode) for encode in (codecs.encode, counted)]
    for layer in made:
        torch.manual_seed(0)
        valid = torch.ones(2, 30, dtype=torch.bool)
        valid[0, :7] = False
        fill(layer, 2, 30, valid=valid)
        assert layer.flush(HEADROOM, True)
        layer.keep([torch.arange(n)[torch.arange(n) % 5 > 0] for n in layer.held.lengths], HEADROOM)
        for start in (30, 46):
            layer.flush(HEADROOM, False)
            fill(layer, 2, 16, start)
        assert layer.flush(HEADROOM, False)
    one, other = (layer.held for layer in made)
    assert isinstance(one, QuantizedStore)
    assert isinstance(other, QuantizedStore)
    assert one.encoded == other.encoded
    for mine, theirs in zip(one.rows(), other.rows(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert {codec.kind for codec in calls} >= {storage.key.kind}


def test_only_cpp_encodes_in_cpp() -> None:
    assert [backend for backend in BUILT_IN if backend.encode is not codecs.encode] == [CPP]
    plan = Plan("llama", "float32", (LayerPlan(0, HEADS, HEADS, DIM, 0, 1.0, storage=CHANNEL),))
    for backend in BUILT_IN:
        cache = KVCache(plan, backend=backend)
        cache.layers[0].append(*torch.zeros(2, 1, HEADS, 4, DIM), torch.arange(4)[None], None, 0)
        assert cache.layers[0].held.format.encoder is backend.encode
        assert cache.fork().layers[0].held.format.encoder is backend.encode
