"""The contract of recall: what every policy that keeps all and reads few promises, for each row of its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contract_recall import BUDGET, DROPS, ENCODES, EVERY, TABLE, Tape, model_of, pairs, parts_of, recalls
from contract_table import HEADS, LAYERS, compiled, dense, kept_positions, off
from test_contract import steps
from tiny import tiny_ids
from torch import Tensor

from kvcompile.artifact import artifact
from kvcompile.compiler import assemble
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.proof import prove
from kvcompile.models.sharing import shared
from kvcompile.runtime.cache import KVCache
from kvcompile.stack import discover

TOKENS, NEW = 60, 24
every = pytest.mark.parametrize(("name", "beside"), pairs())
every_row = pytest.mark.parametrize("name", TABLE)


def elsewhere(*besides: str) -> Any:
    """On a llama, and beside some on families with learned sinks, and with layers that slide."""
    more = [(name, b, a) for name, b in pairs(*besides) for a in ("gpt_oss", "gemma2")]
    return pytest.mark.parametrize(
        ("name", "beside", "architecture"), [*((name, b, "llama") for name, b in pairs()), *more]
    )


def test_every_recall_has_a_row() -> None:
    assert {row.policy for row in TABLE.values()} == {n for n, cls in discover().items() if cls.family == "recall"}


@pytest.mark.parametrize(("name", "beside"), [(name, b) for name, row in TABLE.items() for b in row.refused])
def test_what_cannot_stand_beside_it_is_refused_in_a_line(name: str, beside: str) -> None:
    with pytest.raises(KvcompileError) as caught:
        TABLE[name].plan(beside)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


@elsewhere("alone", "kivi", "offload")
def test_a_budget_of_everything_is_the_stack_without_it(name: str, beside: str, architecture: str) -> None:
    """To rounding; alone, that is the uncompressed model."""
    stack, ids = TABLE[name].stack(beside, budget=1.0), tiny_ids(2, TOKENS + NEW)
    without = {policy: fields for policy, fields in stack.items() if policy != TABLE[name].policy}
    got, cache = steps(model_of(name, beside, architecture, budget=1.0), ids, TOKENS)
    expected, _ = steps(compiled(without, architecture, "sdpa"), ids, TOKENS)
    assert off(got, expected) < (0.03 if beside in ENCODES else 1e-5)  # others share scales where entries moved
    if beside == "alone":
        assert off(got, steps(dense(architecture), ids, TOKENS)[0]) < 1e-5
    assert all(layer.index.covered[0] > BUDGET for layer in recalls(cache)), "nothing was chosen among"


@every
def test_a_small_budget_is_another_model(name: str, beside: str) -> None:
    """Else the test above says nothing."""
    ids = tiny_ids(1, TOKENS + NEW)
    whole, part = (model_of(name, beside, budget=b) for b in (1.0, 4))
    assert off(steps(part, ids, TOKENS)[0][:, TOKENS:], steps(whole, ids, TOKENS)[0][:, TOKENS:]) > 0.01


def is_whole(tape: Tape, b: int) -> None:
    """Every token of sequence b is in each row once, in one part, with its own key."""
    layer = tape.layer
    rows = layer.held.rows()
    for h in range(layer.plan.kv_heads):
        r = b * layer.plan.kv_heads + h
        keys, _, positions = rows[r]
        sinks, groups, recent = parts_of(layer, r)
        assert [*sinks, *(e for group in groups for e in group), *recent] == list(range(len(positions)))
        assert sorted(positions.tolist()) == list(range(tape.cache.seen[b]))
        at = positions.expand(tape.batch, -1) if tape.batch > 1 else positions[None]
        own = tape.states(at)[0][b, h]
        torch.testing.assert_close(keys, own, atol=0.05 if layer.plan.storage.quantized else 0, rtol=0)


@pytest.mark.parametrize(("name", "beside"), [(n, b) for n, b in pairs() if b not in DROPS | {"gqa", "cla", "mla"}])
def test_nothing_is_ever_lost(name: str, beside: str) -> None:
    """After 1,000 decoded tokens, groups made while decoding, a prompt in chunks, and two more prompts."""
    tape = Tape(TABLE[name].plan(beside))
    tape.feed(30, prompt=True, last=False, pads=(0, 11))
    tape.feed(25, prompt=True)
    grouped = set()
    for turn in range(3):
        for t in range(334):
            tape.feed(1, prompt=False)
            grouped.add(tape.layer.index.covered[0])
            if t % 83 == 0:
                for b in range(2):
                    is_whole(tape, b)
        tape.feed((19, 2, 40)[turn], prompt=True)
    assert tape.cache.seen == [55 + 1002 + 61, 44 + 1002 + 61]
    assert len(grouped) > 10, "groups were made while tokens were decoded"
    for b in range(2):
        is_whole(tape, b)
    assert tape.layer.held.lengths[0] - tape.layer.index.covered[0] < 100, "old tokens are in groups"


@every
def test_what_is_read_is_sinks_budget_and_recent(name: str, beside: str) -> None:
    """Of a padded batch, row by row, ascending, over groups made while decoding."""
    if beside in DROPS | {"gqa", "cla", "mla"}:
        pytest.skip("a layer alone selects nothing, and has its own shape")
    tape = Tape(TABLE[name].plan(beside))
    tape.feed(TOKENS, prompt=True, pads=(0, 13))
    for _ in range(40):
        parts = [parts_of(tape.layer, r) for r in range(2 * HEADS)]
        tape.feed(1, prompt=False)
        for (sinks, groups, recent), chosen, n in zip(parts, tape.chosen, tape.layer.held.lengths, strict=True):
            entries = chosen.tolist()
            assert entries == sorted(set(entries))
            assert set(sinks) | set(recent) | {n - 1} <= set(entries)
            inside = set(entries) - set(sinks) - set(recent) - {n - 1}
            old = {e for group in groups for e in group}
            if tape.recall.reuse == 1:
                assert inside <= old
                assert len(inside) == min(len(old), max(tape.layer.index.unit, BUDGET))
                cut = [g for g in groups if 0 < len(inside & set(g)) < len(g)]
                assert len(cut) <= 1, "only the last group is cut"
                assert all(set(g[: len(inside & set(g))]) <= inside for g in cut), "at its end"


@elsewhere("alone", "kivi", "offload", "snapkv", "mla")
def test_bytes_are_the_planned_ones(name: str, beside: str, architecture: str) -> None:
    """Held on the device, in host memory, index, and read per step: of prompts short and long, whole and in chunks."""
    for chunk in (0, 7):
        model = model_of(name, beside, architecture, chunk=chunk)
        for tokens in (1, 9, 12, TOKENS, 100):
            rows, _ = prove(model, tiny_ids(1, tokens))  # raises where they differ
        assert sum(r.read for r in rows) < sum(r.dense_read for r in rows)
        assert any(r.index_bytes for r in rows)
        owned = [r for r in rows if r.offloaded]
        assert [r.host_bytes for r in owned] == [r.bytes for r in owned]
        with torch.no_grad():
            cache = model(tiny_ids(3, 100)).past_key_values
            cache.reads = {}
            model(tiny_ids(3, 1), past_key_values=cache)
        if beside != "adakv":
            planned = model.kvcompile.plan.bytes(3, 100)
            assert cache.reads == {r.index: r.read for r in planned}


@pytest.mark.parametrize("side", ["left", "right"])
@every
def test_a_batch_is_what_its_sequences_are_alone(name: str, beside: str, side: str) -> None:
    """One of them shorter than the sinks, one than what stays out of groups."""
    lengths, new = (TOKENS, 41, 11, 2), 20
    ids, mask = tiny_ids(4, TOKENS + new), torch.zeros(4, TOKENS, dtype=torch.long)
    places = [slice(TOKENS - n, TOKENS) if side == "left" else slice(n) for n in lengths]
    for b, place in enumerate(places):
        mask[b, place] = 1
    for chunk in (0, 16):
        model = model_of(name, beside, chunk=chunk)
        logits, cache = continued(model, ids, mask, TOKENS)
        for b, place in enumerate(places):
            own = torch.cat((ids[b : b + 1, place], ids[b : b + 1, TOKENS:]), 1)
            alone, single = steps(model, own, lengths[b])
            assert off(logits[b], alone[0, lengths[b] :]) < (0.05 if beside in ENCODES else 1e-4)
            rows = [layer[b * len(layer) // 4 : (b + 1) * len(layer) // 4] for layer in kept_positions_of(cache)]
            assert rows == kept_positions_of(single)


@torch.no_grad()
def continued(model: Any, ids: Tensor, mask: Tensor, prompt: int) -> tuple[Tensor, Any]:
    """Logits of each token after a padded prompt, `[B, n, vocabulary]`, and the cache."""
    cache = model(ids[:, :prompt], attention_mask=mask).past_key_values
    logits = []
    for t in range(prompt, ids.shape[1]):
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        logits.append(model(ids[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(logits, 1), cache


def kept_positions_of(cache: KVCache) -> list[list[list[int]]]:
    """`kept_positions`, where layers that read another one have none."""
    return [[at.tolist() for _, _, at in layer.held.rows()] for layer in cache.layers if layer.store is not None]


@torch.no_grad()
def decoded(model: Any, cache: Any, ids: Tensor) -> Tensor:
    return torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])], 1)


@every
def test_forks_go_their_own_way(name: str, beside: str) -> None:
    """And what one of them groups, the other does not see."""
    model, ids = model_of(name, beside), tiny_ids(2, TOKENS + 2 * NEW)
    expected, cache = steps(model, ids, TOKENS)
    with torch.no_grad():
        first = model(ids[:, :TOKENS]).past_key_values
    decoded(model, first, ids[:, TOKENS : TOKENS + 5])
    second = first.fork()
    decoded(model, second, ids[:, :NEW])
    got = decoded(model, first, ids[:, TOKENS + 5 :])
    assert torch.equal(got, expected[:, TOKENS + 5 :])
    assert kept_positions_of(first) == kept_positions_of(cache)
    assert first.index_bytes() == cache.index_bytes()


@every
def test_beams_are_sequences_of_their_own(name: str, beside: str) -> None:
    """Reordered and repeated rows go on as forks of each sequence would."""
    model, ids = model_of(name, beside), tiny_ids(2, TOKENS + NEW)
    order, more = [1, 1, 0], tiny_ids(3, NEW, seed=5)
    with torch.no_grad():
        cache = model(ids[:, :TOKENS]).past_key_values
        decoded(model, cache, ids[:, TOKENS : TOKENS + 3])
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([2, 3, 1]))
        got = decoded(model, cache, more)
        for b, source in enumerate(order):
            alone = model(ids[source : source + 1, :TOKENS]).past_key_values
            decoded(model, alone, ids[source : source + 1, TOKENS : TOKENS + 3])
            expected = decoded(model, alone, more[b : b + 1])
            assert off(got[b], expected[0]) < (0.05 if beside in ENCODES else 1e-4)


@every_row
def test_beam_search_with_a_budget_of_everything_is_that_of_transformers(name: str) -> None:
    ids = tiny_ids(2, TOKENS)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    got = model_of(name, budget=1.0).generate(ids, attention_mask=mask, **options)
    assert torch.equal(got, dense().generate(ids, attention_mask=mask, **options))


@pytest.mark.parametrize(("name", "beside"), pairs("alone", "snapkv", "kivi, paged, offload"))
def test_what_is_loaded_is_what_was_saved(name: str, beside: str, tmp_path: Path) -> None:
    """To the bit, over groups made while decoding."""
    ids = tiny_ids(1, TOKENS + NEW)
    config = finish(Config(stack=TABLE[name].stack(beside), prefill_chunk=32))
    model = assemble(shared(dense()), config)
    loaded = artifact.load(artifact.save(model, tmp_path / "artifact"))
    (expected, cache), (got, again) = (steps(m, ids, TOKENS) for m in (model, loaded))
    assert torch.equal(got, expected)
    assert kept_positions(again) == kept_positions(cache)
    assert loaded.kvcompile.plan == model.kvcompile.plan
    graph = (tmp_path / "artifact/graph.txt").read_text()
    assert all(f"{op}_{i}" in graph for op in ("recall", "index") for i in range(1, LAYERS))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(("name", "beside"), pairs("alone", "kivi", "mla"))
def test_every_backend_reads_the_same(name: str, beside: str, backend: str) -> None:
    """Logits as the library has them. The C++ kernel meets codes with rounded queries, so that the keys of later
    tokens differ in their last bits, and so may the order that clusters of these are put in.
    """
    ids = tiny_ids(2, TOKENS + 2 * EVERY)
    expected, cache = steps(model_of(name, beside), ids, TOKENS)
    got, other = steps(model_of(name, beside, kernels=backend), ids, TOKENS)
    assert off(got, expected) < (0.02 if beside in ENCODES else 1e-4)
    of_other, of_library = ([[sorted(row) for row in layer] for layer in kept_positions(c)] for c in (other, cache))
    assert of_other == of_library


def test_a_choice_stands_for_the_steps_it_is_made_for() -> None:
    """And for no step after another prompt, however short it is."""
    tape = Tape(TABLE["quest, reuse"].plan(every=1000))
    tape.feed(TOKENS, prompt=True)
    choices = []
    for turn in range(2):
        for _ in range(7):
            tape.feed(1, prompt=False)
            first = tape.layer.index.first
            choices.append([e for e in tape.chosen_row(0) if first <= e < first + tape.layer.index.covered[0]])
        if not turn:
            tape.feed(1, prompt=True)
    inside = [choices[i : i + 3] for i in (0, 3, 7, 10)]
    assert all(a == b == c for a, b, c in inside)
    assert choices[2] != choices[3]
    assert choices[6] != choices[7], "a choice of the turn before"
    assert choices[9] != choices[10]


def test_a_choice_is_of_its_own_turn() -> None:
    """A second prompt that is too short for a group does not bring an old choice back."""
    tape = Tape(TABLE["quest"].plan(every=1000))
    tape.feed(TOKENS, prompt=True)
    for _ in range(12):
        tape.feed(1, prompt=False)
    tape.feed(2, prompt=True)
    chosen = []
    for _ in range(6):
        tape.feed(1, prompt=False)
        chosen.append([e for e in tape.chosen_row(0) if e < 40])
    assert len({tuple(c) for c in chosen}) > 2
