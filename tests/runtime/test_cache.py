"""The cache as a whole: true positions, crop, reorder, reset, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from tiny import tiny_config
from torch import Tensor

from kvcompile.adapters.architectures import describe
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.plan.selection import Budget, Selection
from kvcompile.policies.snapkv import WindowAttention
from kvcompile.runtime.cache import KVCache, Step
from kvcompile.stores.dense import DenseStore
from kvcompile.stores.ragged import RaggedStore

SELECTION = Selection("test", WindowAttention(2), Budget(0.5), recent=2)


def plan(selection: Selection | None = None) -> Plan:
    return describe(tiny_config("llama")).map(lambda p: replace(p, selection=selection))


def write(cache: KVCache, batch: int, count: int, mask: Tensor | None = None) -> Step:
    """One forward pass as the graph does it, without a model: every value is the true position."""
    step = cache.begin(torch.zeros(batch, count, dtype=torch.long), mask)
    for p, layer in zip(cache.plan.layers, cache.layers, strict=True):
        kv = step.positions.float()[:, None, :, None].expand(-1, p.kv_heads, -1, p.head_dim)
        layer.append(kv, kv, step.positions, step.valid, cache.headroom)
    return step


def positions(cache: KVCache, layer: int = 0) -> list[list[int]]:
    """True positions of each row; that keys went the same way is checked on the way."""
    out = []
    for keys, values, at in cache.layers[layer].held.rows():
        assert keys[:, 0].tolist() == at.tolist() == values[:, -1].tolist()
        out.append(at.tolist())
    return out


def padded(*pads: int, columns: int) -> Tensor:
    mask = torch.ones(len(pads), columns, dtype=torch.long)
    for b, n in enumerate(pads):
        mask[b, :n] = 0
    return mask


def test_padding_is_neither_stored_nor_counted() -> None:
    cache = KVCache(plan())
    write(cache, 2, 5, padded(0, 3, columns=5))
    assert cache.seen == [5, 2]
    assert cache.get_seq_length() == 5
    assert cache.lengths()[0] == [5, 5, 2, 2]
    write(cache, 2, 1, padded(0, 3, columns=6))
    assert cache.seen == [6, 3]
    assert positions(cache) == [[0, 1, 2, 3, 4, 5]] * 2 + [[0, 1, 2]] * 2
    size = cache.plan.layers[0].head_dim * 2 * 4
    assert cache.nbytes() == 4 * (6 + 6 + 3 + 3) * size


def test_padding_in_a_later_turn() -> None:
    """The second prompts are padded too, between the first answers and themselves."""
    cache = KVCache(plan())
    write(cache, 2, 3)
    assert isinstance(cache.layers[0].store, DenseStore)
    mask = torch.cat((torch.ones(2, 3), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])), 1)
    step = write(cache, 2, 4, mask)
    assert isinstance(cache.layers[0].store, RaggedStore)
    assert positions(cache) == [[0, 1, 2, 3, 4, 5, 6]] * 2 + [[0, 1, 2, 3, 4]] * 2
    assert step.positions[1, 2:].tolist() == [3, 4]


def test_steps_know_where_they_stand() -> None:
    cache = KVCache(plan())
    assert write(cache, 1, 1).prefill, "a prompt of one token is a prompt"
    ticks = [write(cache, 1, 1) for _ in range(3)]
    assert [s.tick for s in ticks] == [1, 2, 3]
    assert not any(s.prefill for s in ticks)
    assert [s.due(2) for s in ticks] == [False, True, False]
    assert not any(s.due(0) for s in ticks)
    again = write(cache, 1, 4)
    assert again.prefill
    assert again.due(0)
    assert write(cache, 1, 1).tick == 1
    cache.chunk(prompting=True, last=False)
    first = write(cache, 1, 4)
    assert (first.due(0), first.due(0, between_chunks=False)) == (True, False)
    cache.chunk(prompting=True, last=True)
    rest = write(cache, 1, 1)
    assert rest.prefill, "the last chunk may be a single token"
    assert rest.due(0, between_chunks=False)


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (torch.ones(2, 1, 4, 4), "padding mask"),
        (torch.ones(3, 4), "padding mask"),
        (torch.ones(2, 3), "padding mask"),
        (torch.ones(2, 5), "padding mask"),
        (torch.zeros(4), "padding mask"),
    ],
    ids=["4d", "batch", "short", "long", "1d"],
)
def test_masks_that_are_no_padding_masks(mask: Tensor, rule: str) -> None:
    with pytest.raises(KvcompileError, match=rule):
        KVCache(plan()).begin(torch.zeros(2, 4), mask)


def test_a_mask_must_cover_the_past() -> None:
    cache = KVCache(plan())
    write(cache, 2, 4)
    with pytest.raises(KvcompileError, match="padding mask"):
        cache.begin(torch.zeros(2, 3), padded(0, 1, columns=3))


def test_a_refused_pass_leaves_no_trace() -> None:
    cache = KVCache(plan())
    for tokens, mask in ((torch.zeros(2, 4), torch.ones(3, 4)), (torch.zeros(3, 4), torch.ones(2, 4))):
        with pytest.raises(KvcompileError):
            cache.begin(tokens, mask)
    assert cache.seen == []
    write(cache, 1, 4)
    assert cache.seen == [4]


def test_another_batch() -> None:
    cache = KVCache(plan())
    write(cache, 2, 4)
    with pytest.raises(KvcompileError, match="one batch, got 3 sequences after 2"):
        cache.begin(torch.zeros(3, 1), None)


@pytest.mark.parametrize("pads", [0, 2])
def test_reorder_repeat_select(pads: int) -> None:
    cache = KVCache(plan())
    write(cache, 3, 6, padded(0, pads, 2 * pads, columns=6))
    cache.shift = torch.tensor([0, 10, 20])
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    assert cache.seen == [6 - 2 * pads, 6, 6 - 2 * pads]
    assert cache.shift.tolist() == [20, 0, 20]
    assert [len(r) for r in positions(cache)[::2]] == cache.seen
    cache.batch_select_indices(torch.tensor([1, 0]))
    assert cache.seen == [6, 6 - 2 * pads]
    cache.batch_repeat_interleave(2)
    assert cache.seen == [6, 6, 6 - 2 * pads, 6 - 2 * pads]
    assert cache.batch_size == 4
    write(cache, 4, 1)
    assert [r[-1] for r in positions(cache)[::2]] == [6, 6, 6 - 2 * pads, 6 - 2 * pads]


def test_crop_takes_back_exactly() -> None:
    cache = KVCache(plan())
    write(cache, 2, 6)
    cache.crop(-2)
    cache.crop(0)
    assert cache.seen == [4, 4]
    assert cache.get_seq_length() == 4
    write(cache, 2, 1)
    assert positions(cache) == [[0, 1, 2, 3, 4]] * 4


@pytest.mark.parametrize("tokens", [2, -7])
def test_crop_of_what_is_not_there(tokens: int) -> None:
    cache = KVCache(plan())
    write(cache, 2, 6)
    with pytest.raises(KvcompileError, match="cropped"):
        cache.crop(tokens)
    assert cache.seen == [6, 6]


def test_crop_stops_at_padding_and_evictions() -> None:
    cache = KVCache(plan())
    write(cache, 2, 6, padded(0, 1, columns=6))
    with pytest.raises(KvcompileError, match="0 such tokens"):
        cache.crop(-1)
    write(cache, 2, 1)
    cache.crop(-1)
    cache.evicted(0, 3)
    write(cache, 2, 2)
    with pytest.raises(KvcompileError, match="2 such tokens"):
        cache.crop(-3)
    cache.crop(-2)
    assert cache.seen == [6, 5]


def test_croppable_only_where_nothing_can_be_dropped() -> None:
    assert KVCache(plan()).is_croppable
    assert not KVCache(plan(SELECTION)).is_croppable
    assert not KVCache(describe(tiny_config("mistral"))).is_croppable


def test_reset_is_a_new_cache() -> None:
    cache = KVCache(plan())
    write(cache, 2, 6, padded(0, 1, columns=6))
    cache.evicted(0, 3)
    cache.shift = torch.tensor([1, 1])
    cache.reset()
    assert (cache.seen, cache.shift, cache.nbytes(), cache.allocated(), cache.get_seq_length()) == ([], None, 0, 0, 0)
    assert cache.evictions.dropped == {}
    write(cache, 1, 3)
    assert positions(cache) == [[0, 1, 2]] * 2


def test_copies_are_independent() -> None:
    """How transformers' users keep the cache of a shared prefix."""
    cache = KVCache(plan(SELECTION))
    write(cache, 1, 3)
    other = copy.deepcopy(cache)
    write(other, 1, 2)
    assert (cache.seen, other.seen) == ([3], [5])
    assert positions(cache) == [[0, 1, 2]] * 2
    assert other.plan == cache.plan


def test_a_cache_is_not_pickled() -> None:
    """Nor copied by halves, with the layers of another."""
    for by in (pickle.dumps, copy.copy):
        with pytest.raises(KvcompileError, match=r"not pickled.*deepcopy"):
            by(KVCache(plan()))


def test_kernels_are_named_by_what_is_stored() -> None:
    """A model may be moved to another precision after it was compiled."""
    cache = KVCache(plan())
    step = cache.begin(torch.zeros(1, 2), None)
    keys = torch.zeros(1, 2, 2, 16, dtype=torch.bfloat16)
    cache.layers[0].append(keys, keys, step.positions, None, 4)
    (part,) = cache.kernels.spec(0, cache.layers[0].held.parts).parts
    assert (part.key.kind, part.value.kind, part.layout) == ("bfloat16", "bfloat16", "dense")
    assert [s.name for s in cache.kernels.expected(0)] == ["dense-float32-g2-d16", "ragged-float32-g2-d16"]
