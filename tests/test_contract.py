"""The contract: what every policy promises, for each row of the table, on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_table import (
    DIM,
    HEADS,
    LAYERS,
    LEAST,
    SINKS,
    STORED,
    TABLE,
    Row,
    compiled,
    dense,
    kept_positions,
    off,
    plan_of,
    stored_bytes,
    true_rows,
)
from tiny import tiny_ids
from torch import Tensor

from kvcompile.artifact import artifact
from kvcompile.compiler import assemble
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.evaluation.proof import prove
from kvcompile.models.sharing import shared
from kvcompile.policies.quantized import StoragePolicy
from kvcompile.runtime.cache import KVCache, Step
from kvcompile.runtime.eviction import compress, observe
from kvcompile.stack import discover

TOKENS, BUDGET = 60, 24
PER_TOKEN = 2 * DIM * 4  # bytes of a key and a value
every = pytest.mark.parametrize(("name", "row"), TABLE.items(), ids=TABLE)


def everywhere(*architectures: str) -> Any:
    """Every row on a llama, and on these where its layers may slide (all of mistral's do)."""
    pairs = [(name, a) for name in TABLE for a in ("llama", *architectures)]
    slides = [(name, a) for name, a in pairs if a in ("gemma2", "mistral")]
    refused = [
        (name, a) for name, a in slides if name == "streaming, compact" or (TABLE[name].encoded and a == "mistral")
    ]
    allowed = [pair for pair in pairs if pair not in refused]
    return pytest.mark.parametrize(("name", "architecture"), allowed)


def prefill(model: Any, ids: Tensor) -> Any:
    with torch.no_grad():
        return model(ids, logits_to_keep=1).past_key_values


def steps(model: Any, ids: Tensor, prompt: int) -> tuple[Tensor, Any]:
    """Logits of a prefill of `prompt` tokens and of one step for each later one, `[B, n, vocabulary]`; the cache."""
    with torch.no_grad():
        out = model(ids[:, :prompt], use_cache=True)
        logits = [out.logits]
        for t in range(prompt, ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, 1), out.past_key_values


def totals(cache: Any) -> list[int]:
    return [sum(lengths) for lengths in cache.lengths()]


def test_every_policy_has_a_row() -> None:
    selecting = {name for name, cls in discover().items() if cls.family == "selection"}
    assert {row.policy for row in TABLE.values()} == selecting - {"attention_matching"}  # which selects nothing itself
    quantized = {name for name, cls in discover().items() if issubclass(cls, StoragePolicy)}
    assert {name for stack, _ in STORED.values() for name in stack} == quantized - {"center"}  # test_center.py


@everywhere("gemma2", "qwen3")
def test_a_budget_that_holds_the_prompt_is_dense(name: str, architecture: str) -> None:
    row, ids = TABLE[name], tiny_ids(2, TOKENS + 8)
    budget = 1.0 if architecture == "llama" else TOKENS
    got, cache = steps(compiled(row.fields(budget, **row.everything), architecture), ids, TOKENS)
    expected, _ = steps(dense(architecture), ids, TOKENS)
    assert off(got, expected) < row.logits
    if not row.encoded:  # a prompt whose kernel sums up scores too adds in another order than SDPA
        torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-5)
    for p, lengths in zip(cache.plan.layers, cache.lengths(), strict=True):
        assert min(lengths) >= p.span(TOKENS + 8)


@pytest.mark.parametrize("budget", [LEAST, BUDGET, 51, 0.4])
@every
def test_the_budget_is_kept_to_the_token(name: str, row: Row, budget: float) -> None:
    model = compiled(row.fields(budget))
    cache = prefill(model, tiny_ids(1, TOKENS))
    wanted = int(budget * TOKENS) if budget <= 1 else int(budget)
    lengths = cache.lengths()
    assert all(SINKS + row.newest(wanted) <= n <= TOKENS for layer in lengths for n in layer)
    if row.split == "threshold":
        assert sum(totals(cache)) < LAYERS * HEADS * TOKENS, "no row shows that it drops anything"
        return
    assert sum(totals(cache)) == row.promised(wanted, TOKENS)
    if row.split == "layer":
        assert totals(cache) == [HEADS * wanted] * LAYERS
    if row.split == "head":
        whole = dict.fromkeys(row.whole, TOKENS)
        assert lengths == [[whole.get((i, h), wanted) for h in range(HEADS)] for i in range(LAYERS)]
    static = [model.kvcompile.plan.kept(i, TOKENS) for i in range(LAYERS)]
    assert all(kept is None or list(kept) == held for kept, held in zip(static, lengths, strict=True))


@pytest.mark.parametrize("budget", [BUDGET, 0.5])
@everywhere("gemma2", "mistral")
def test_measured_bytes_are_the_planned_ones(name: str, architecture: str, budget: float) -> None:
    model = compiled(TABLE[name].fields(budget), architecture)
    rows, total = prove(model, tiny_ids(1, TOKENS))  # raises where they differ
    assert [r.bytes for r in rows] == [
        sum(p.nbytes(n, "float32", low) for n, low in zip(r.kept, r.low, strict=True))
        for r, p in zip(rows, model.kvcompile.plan.layers, strict=True)
    ]
    dynamic = [r for r in rows if r.planned is None]
    assert total is None or sum(sum(r.kept) for r in dynamic) == total
    assert [r.bytes for r in rows] == [r.planned_bytes for r in rows]


@every
def test_memory_is_given_back(name: str, row: Row) -> None:
    """What the tensors keep alive, not what they count: no view may hold on to the full prompt."""
    tokens, budget = 480, 48
    cache = prefill(compiled(row.fields(budget)), tiny_ids(1, tokens))
    alive = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in layer.held.tensors())
    entries = sum(totals(cache)) + row.rooms * LAYERS * HEADS * cache.headroom
    assert alive == cache.allocated() <= entries * (PER_TOKEN + 4)
    assert cache.nbytes() == sum(stored_bytes(cache))
    if row.split != "threshold" and not row.encoded:
        assert alive <= (row.promised(budget, tokens) + LAYERS * HEADS * cache.headroom) * (PER_TOKEN + 4)
        assert cache.nbytes() == row.promised(budget, tokens) * PER_TOKEN


@every
def test_what_is_kept_is_true_and_protected(name: str, row: Row) -> None:
    """Kept keys are those of the dense model at the same positions; sinks and the newest tokens are among them."""
    ids = tiny_ids(1, TOKENS)
    cache = prefill(compiled(row.fields(BUDGET)), ids)
    with torch.no_grad():
        full = dense()(ids).past_key_values
    for layer, reference in zip(cache.layers, full.layers, strict=True):
        for h, (keys, values, positions) in enumerate(true_rows(layer)):
            at = positions.tolist()
            assert at == sorted(set(at))
            assert set(at) >= {*range(SINKS), *range(TOKENS - row.newest(BUDGET), TOKENS)}
            if name != "streaming, compact":  # which rotates keys to other positions
                torch.testing.assert_close(keys, reference.keys[0, h, positions], atol=row.error, rtol=1e-5)
            torch.testing.assert_close(values, reference.values[0, h, positions], atol=row.error, rtol=1e-5)


@every
def test_without_decode_eviction_rows_grow_by_one_a_token(name: str, row: Row) -> None:
    model, ids = compiled(row.fields(BUDGET)), tiny_ids(1, TOKENS + 9)
    before = prefill(model, ids[:, :TOKENS]).lengths()
    _, cache = steps(model, ids, TOKENS)
    assert cache.lengths() == [[n + 9 for n in layer] for layer in before]
    for layer in kept_positions(cache):
        assert all(at[-9:] == list(range(TOKENS, TOKENS + 9)) for at in layer)


@every
def test_decode_eviction_bounds_the_rows(name: str, row: Row) -> None:
    often, ids = 4, tiny_ids(1, TOKENS + 3 * LEAST)
    model = compiled(row.fields(BUDGET, decode_every=often))
    with torch.no_grad():
        cache = model(ids[:, :TOKENS], logits_to_keep=1).past_key_values
        for t in range(TOKENS, ids.shape[1]):
            model(ids[:, t : t + 1], past_key_values=cache)
            seen, since = t + 1, (t + 1 - TOKENS) % often
            if row.split == "threshold":
                assert since or sum(totals(cache)) < LAYERS * HEADS * seen
            else:
                assert sum(totals(cache)) == row.promised(BUDGET, seen - since) + LAYERS * HEADS * since
    assert ids.shape[1] - TOKENS > BUDGET, "too few tokens to drop decoded ones"
    for layer in kept_positions(cache):
        for at in layer:
            assert at == sorted(set(at))
            assert set(at) >= {*range(SINKS), *range(seen - row.newest(BUDGET), seen)}
    with torch.no_grad():
        full = dense()(ids).past_key_values.layers[0].values[0]
    for h, (_, values, at) in enumerate(true_rows(cache.layers[0])):  # values of the first layer see no other token
        torch.testing.assert_close(values, full[h, at], atol=row.error, rtol=1e-5)


def test_a_sliding_layer_within_budget_still_frees_what_has_left_its_window() -> None:
    ids = tiny_ids(1, 230)
    for name in ("snapkv", "zigzag", "h2o"):
        _, cache = steps(compiled(TABLE[name].fields(BUDGET), "gemma2"), ids, TOKENS)
        window, slides = cache.plan.layers[0].sliding_window, [bool(p.sliding_window) for p in cache.plan.layers]
        for lengths, sliding in zip(cache.lengths(), slides, strict=True):
            assert max(lengths) < window + 64 if sliding else max(lengths) > 170


@pytest.mark.parametrize("chunk", [7, 16])
@every
def test_chunked_prefill_never_holds_more_than_budget_and_chunk(name: str, row: Row, chunk: int) -> None:
    tokens = 100
    model = compiled(row.fields(BUDGET, between_chunks=True), prefill_chunk=chunk)
    cache, held = model.new_cache(), []
    inner = cache.backend.attend

    def attend(*given: Any) -> Tensor:
        held.append((sum(totals_so_far(cache)), cache.allocated(), min(cache.seen)))
        return inner(*given)

    cache.backend = replace(cache.backend, attend=attend)
    with torch.no_grad():
        model(tiny_ids(1, tokens), past_key_values=cache, logits_to_keep=1)
    assert row.replays or len(held) == LAYERS * -(-tokens // chunk)
    for entries, allocated, seen in held:
        room = LAYERS * HEADS * (chunk + row.rooms * cache.headroom)
        if row.split != "threshold":
            assert entries <= row.promised(BUDGET, seen) + LAYERS * HEADS * chunk
            assert allocated <= (row.promised(BUDGET, seen) + room) * (PER_TOKEN + 4)
        else:
            assert seen < 2 * chunk + row.newest(0) or entries < LAYERS * HEADS * seen


def totals_so_far(cache: Any) -> list[int]:
    return [sum(layer.store.lengths) for layer in cache.layers if layer.store is not None]


@every
def test_the_plan_is_data(name: str, row: Row) -> None:
    """The same fields give the same plan, other fields another: what artifacts are compared by."""
    one, same = plan_of(row.fields(BUDGET)), plan_of(row.fields(BUDGET))
    assert one == same
    assert one.digest() == same.digest()
    other = plan_of(row.fields(BUDGET, sinks=SINKS + 1))
    assert other.digest() != one.digest()


def planted(finds: str, at: int) -> tuple[Tensor, Tensor]:
    """Queries `[1, H_q, n, D]` and keys `[1, H_kv, n, D]` of noise, with a needle in every head at position `at`."""
    source = torch.Generator().manual_seed(1)
    asked = torch.nn.functional.normalize(torch.randn(1, HEADS, 1, DIM, generator=source), dim=-1) * 4
    queries = asked.repeat_interleave(2, 1) + 0.3 * torch.randn(1, 2 * HEADS, TOKENS, DIM, generator=source)
    keys = 0.5 * torch.randn(1, HEADS, TOKENS, DIM, generator=source)
    if finds == "different":
        keys += asked
    keys[:, :, at] = {"attended": 4 * asked, "different": -asked, "short": 0.01 * asked}[finds][:, :, 0]
    return queries, keys


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.finds])
def test_the_needle_and_its_neighbours_survive(name: str) -> None:
    """One entry that the method is made to notice stays in every row, with those that pooling ties to it."""
    at, row = 23, TABLE[name]
    queries, keys = planted(str(row.finds), at)
    cache = KVCache(plan_of(row.fields(LEAST)))
    cache.seen, positions = [TOKENS], torch.arange(TOKENS).unsqueeze(0)
    step, looks = Step(cache, positions, None, prefill=True, last=True), {}
    for p, layer in zip(cache.plan.layers, cache.layers, strict=True):
        layer.append(keys, torch.ones_like(keys), positions, None, 0)
        looks[p.index] = observe(layer, queries, queries, step, p)
    compress(step, looks)
    reach = getattr(cache.plan.layers[0].selection.score, "kernel", 1) // 2
    for layer_rows in kept_positions(cache):
        assert all(set(kept) >= set(range(at - reach, at + reach + 1)) for kept in layer_rows)


@every
def test_what_is_loaded_is_what_was_saved(name: str, row: Row, tmp_path: Path) -> None:
    """To the bit: a prefill that evicts, and decoding that does."""
    stack, ids = row.fields(BUDGET, decode_every=2), tiny_ids(1, TOKENS + 5)
    model = assemble(shared(dense()), finish(Config(stack=stack, prefill_chunk=32)))
    loaded = artifact.load(artifact.save(model, tmp_path / "artifact"))
    (expected, held), (got, again) = (steps(m, ids, TOKENS) for m in (model, loaded))
    assert torch.equal(got, expected)
    assert kept_positions(again) == kept_positions(held)
    assert loaded.kvcompile.plan == model.kvcompile.plan
