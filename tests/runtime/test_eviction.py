"""Selections at run time: who stays, what is freed, and what is decoded over the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from selecting import (
    Above,
    Expected,
    Hashed,
    PerHead,
    compiled,
    generate,
    hashed,
    kept,
    left_padded,
    predicted,
    prefill,
    selection,
)
from tiny import WINDOW, tiny_config, tiny_ids, tiny_model
from torch import Tensor
from transformers import DynamicCache

from kvcompile.adapters.architectures import describe
from kvcompile.plan.selection import Schedule
from kvcompile.policies.snapkv import WindowAttention
from kvcompile.runtime.cache import KVCache
from kvcompile.runtime.layer import LayerCache
from kvcompile.runtime.selection import highest
from kvcompile.stores.dense import DenseStore
from kvcompile.stores.ragged import RaggedStore

# ---- who stays


@pytest.mark.parametrize("between", [True, False])
@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("budget", [0.4, 9, 0.01, 1.0, 400])
def test_keeps_what_a_naive_selection_keeps(budget: float, chunk: int, between: bool) -> None:
    cache = prefill(compiled(selection(Hashed(), budget, schedule=Schedule(between)), chunk=chunk), tiny_ids(2, 25))
    for layer in range(4):
        for row in range(4):
            held: list[int] = []
            stops = list(range(chunk, 25, chunk)) if chunk and between else []
            for start, stop in zip([0, *stops], [*stops, 25], strict=True):
                held += range(start, stop)
                allowed = max(int(budget * stop + 1e-6) if budget <= 1 else int(budget), 5)
                held = predicted(held, stop, allowed, layer, row % 2)
            assert kept(cache, layer)[row] == held
    assert isinstance(cache.layers[0].store, DenseStore)
    if max(budget, 0.2) < 0.5:
        assert min(cache.evictions.dropped.values()) > 0


@pytest.mark.parametrize("counts", [[0, 0], [1, 7], [12, 0], [5, 12], [12, 12]], ids=str)
def test_of_equal_scores_the_older_entries_stay(counts: list[int]) -> None:
    inf = float("inf")
    scores = torch.tensor([[1.0, 2, 2, 1, inf, 2, 0, 1, 1, 2, -inf, 1], [3.0] * 6 + [inf] * 3 + [3.0] * 3])
    for h, found in enumerate(highest(scores, torch.tensor(counts))):
        best = sorted(range(12), key=lambda j: (-float(scores[h, j]), j))[: counts[h]]
        assert found.tolist() == sorted(best)


def test_a_selection_is_no_part_of_the_gradient() -> None:
    """Scores choose indices: nothing is remembered for a backward pass, which still reaches every weight."""
    model, ids = compiled(selection(Expected(), 0.5, uncertainty=WindowAttention(4))), tiny_ids(1, 24)
    out = model(ids, labels=ids)
    watch = out.past_key_values.layers[1].history
    assert not watch.sums[0].total.requires_grad
    assert not watch.sums[0].outer.requires_grad
    out.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_recent_as_a_fraction_of_the_budget() -> None:
    cache = prefill(compiled(selection(Hashed(), 12, recent=0.5)), tiny_ids(1, 40))
    for h, row in enumerate(kept(cache, 1)):
        assert row == predicted(list(range(40)), 40, 12, 1, h, recent=6)


def test_memory_is_returned_at_once() -> None:
    ids = tiny_ids(2, 200)
    whole, small = prefill(compiled(None), ids), prefill(compiled(selection(Hashed(), 0.1)), ids)
    assert small.nbytes() == whole.nbytes() // 10
    assert small.allocated() < whole.allocated() / 2  # 64 tokens of room weigh more than the 20 kept
    tensors = [t for x in small.layers for t in (x.held.keys, x.held.values, x.held.positions)]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == small.allocated()


def test_a_prompt_that_will_be_cut_gets_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory of a prefill is the prompt itself; room comes with what is kept."""
    peaks: list[int] = []
    attend = LayerCache.attend

    def noting(self: LayerCache, *args: Any) -> Tensor:
        peaks.append(self.held.keys.shape[-2])
        return attend(self, *args)

    monkeypatch.setattr(LayerCache, "attend", noting)
    prefill(compiled(selection(Hashed(), 10)), tiny_ids(1, 64))
    assert peaks == [64] * 4
    peaks.clear()
    prefill(compiled(None), tiny_ids(1, 64))
    assert min(peaks) > 64


def test_between_chunks_bounds_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: list[int] = []
    attend = LayerCache.attend

    def noting(self: LayerCache, *args: Any) -> Tensor:
        peaks.append(max(self.held.lengths))
        return attend(self, *args)

    monkeypatch.setattr(LayerCache, "attend", noting)
    prefill(compiled(selection(Hashed(), 10), chunk=8), tiny_ids(1, 64))
    assert max(peaks) == 18
    peaks.clear()
    prefill(compiled(selection(Hashed(), 10, schedule=Schedule(between_chunks=False)), chunk=8), tiny_ids(1, 64))
    assert max(peaks) == 64


def test_decoding_stays_within_budget() -> None:
    s = selection(Hashed(), 10, schedule=Schedule(decode_every=4))
    out = generate(compiled(s), tiny_ids(2, 30), new=18)
    cache = out.past_key_values
    assert cache.seen == [47, 47]
    held = list(range(30))
    for h in range(2):
        held = predicted(list(range(30)), 30, 10, 2, h)
        for tick in range(1, 18):
            held.append(29 + tick)
            if tick % 4 == 0:
                held = predicted(held, 30 + tick, 10, 2, h)
        assert kept(cache, 2)[h] == held
    without = generate(compiled(selection(Hashed(), 10)), tiny_ids(2, 30), new=18)
    assert without.past_key_values.lengths()[0] == [27] * 4


def test_second_prompt_on_the_same_cache() -> None:
    model = compiled(selection(Hashed(), 0.5))
    cache = prefill(model, tiny_ids(1, 20))
    prefill(model, tiny_ids(1, 10, seed=1), cache=cache)
    assert cache.seen == [30]
    for h, row in enumerate(kept(cache, 3)):
        first = predicted(list(range(20)), 20, 10, 3, h)
        assert row == predicted([*first, *range(20, 30)], 30, 15, 3, h)


def test_threshold_instead_of_budget() -> None:
    cache = prefill(compiled(selection(Hashed(), None, allocation=Above(500.0))), tiny_ids(2, 40))
    for layer in range(4):
        for row, positions in enumerate(kept(cache, layer)):
            every = torch.arange(40)
            good = (hashed(every, layer, torch.tensor(row % 2)) > 500) | (every < 2) | (every >= 37)
            assert positions == every[good].tolist()
    assert len(set(cache.lengths()[0])) > 1


@pytest.mark.parametrize("across", [False, True])
def test_shared_budgets_are_spent_exactly(across: bool) -> None:
    model = compiled(selection(Hashed(), 0.4, allocation=PerHead(across)), layers=[0, 2, 3])
    cache = prefill(model, tiny_ids(2, 30))
    assert cache.lengths()[1] == [30] * 4
    spent = torch.tensor([cache.lengths()[i] for i in (0, 2, 3)]).view(3, 2, 2)
    assert len(set(spent.flatten().tolist())) > 1
    if across:
        assert spent.sum((0, 2)).tolist() == [6 * 12] * 2
        assert len(set(spent.sum(2).flatten().tolist())) > 1
    else:
        assert spent.sum(2).flatten().tolist() == [24] * 6
    for layer in (0, 2, 3):
        equal = len(set(cache.lengths()[layer])) == 1
        assert isinstance(cache.layers[layer].store, DenseStore if equal else RaggedStore)
        for row, positions in enumerate(kept(cache, layer)):
            assert positions == predicted(list(range(30)), 30, len(positions), layer, row % 2)


# ---- sliding layers


def test_sliding_layers_are_trimmed() -> None:
    out = generate(compiled(None, "mistral"), tiny_ids(1, 50), new=100)
    cache = out.past_key_values
    assert cache.seen == [149]
    assert all(n == WINDOW + 99 - 64 for rows in cache.lengths() for n in rows)
    assert cache.allocated() < 4 * 2 * (WINDOW + 64 + 64 + 64) * (2 * 16 * 4 + 4)


@pytest.mark.parametrize("chunk", [0, 7])
def test_selection_inside_a_window(chunk: int) -> None:
    """The budget is a fraction of what the window shows; entries that left it go first."""
    model = compiled(selection(Hashed(), 0.5, recent=2), "gemma2", chunk=chunk)
    cache = prefill(model, tiny_ids(2, 40))
    assert cache.lengths() == [[8] * 4, [20] * 4, [8] * 4, [20] * 4]
    assert all(min(row) >= 40 - WINDOW for layer in (0, 2) for row in kept(cache, layer))
    if not chunk:
        for h, row in enumerate(kept(cache, 0)[:2]):
            assert row == predicted(list(range(40 - WINDOW, 40)), 40, 8, 0, h, sinks=0, recent=2)


def test_backend_and_reference_agree_after_evicting_inside_a_window() -> None:
    ids, outs = tiny_ids(2, 40), []
    for kernels in ("sdpa", "reference"):
        model = compiled(selection(Hashed(), 0.5), "mistral", kernels=kernels)
        cache = prefill(model, ids)
        with torch.no_grad():
            outs.append(torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(14)], 1))
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


# ---- decoding over what was kept


def gathered(original: Any, ids: Tensor, cache: KVCache) -> DynamicCache:
    """What transformers would hold, had it the same entries."""
    with torch.no_grad():
        whole = original(ids, use_cache=True).past_key_values
    for i, layer in enumerate(whole.layers):
        index = torch.tensor(kept(cache, i)).view(*layer.keys.shape[:2], -1, 1)
        layer.keys, layer.values = layer.keys.take_along_dim(index, 2), layer.values.take_along_dim(index, 2)
    return whole


@pytest.mark.parametrize("name", ["llama", "smollm3", "gpt_neox", "qwen3"])
def test_decodes_like_the_original_over_the_kept_entries(name: str) -> None:
    original, model, ids = tiny_model(name), compiled(selection(Hashed(), 0.3), name), tiny_ids(2, 30)
    cache = prefill(model, ids)
    theirs = gathered(original, ids, cache)
    with torch.no_grad():
        for i in range(4):
            token, at = tiny_ids(2, 1, seed=i), torch.tensor([[30 + i]])
            ours = model(token, past_key_values=cache).logits
            n = theirs.layers[0].keys.shape[2]
            expected = original(
                token, past_key_values=theirs, position_ids=at, attention_mask=torch.ones(2, n + 1)
            ).logits
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("across", [False, True])
def test_ragged_rows_decode_like_the_reference(across: bool) -> None:
    s = selection(Hashed(), 0.3, allocation=PerHead(across), schedule=Schedule(decode_every=5))
    ids, mask = left_padded(30, 0, 11)
    first, second = (generate(compiled(s, kernels=k), ids, mask, output_logits=True) for k in ("sdpa", "reference"))
    assert first.past_key_values.lengths() == second.past_key_values.lengths()
    torch.testing.assert_close(torch.stack(first.logits), torch.stack(second.logits), atol=3e-5, rtol=1e-5)


def test_the_plan_of_the_tests_is_the_plan_of_the_model() -> None:
    assert [p.sliding_window for p in describe(tiny_config("gemma2")).layers] == [WINDOW, None, WINDOW, None]
