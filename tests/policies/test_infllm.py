"""InfLLM beside itself word for word, beside the uncompressed model, and at one distance."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_table import compiled, dense, off, plan_of
from literal_infllm import Literal
from tiny import tiny_ids
from torch import Tensor

from kvcompile.adapters.architectures import architecture_of
from kvcompile.artifact import artifact
from kvcompile.compiler import assemble, compile_plan
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.proof import prove
from kvcompile.kernels.dispatch import why
from kvcompile.models.sharing import shared
from kvcompile.plan.recall import Entries
from kvcompile.policies.infllm import Blocks, InfLLM
from kvcompile.runtime.positions import turn

FIELDS: dict[str, Any] = {"block": 8, "strongest": 2, "sinks": 4, "recent": 16, "every": 16, "budget": 20}
TOKENS, CHUNK, NEW = 70, 12, 40
FAR, HEADS = ("original", "constant"), ("own", "shared")
BACKENDS = ("sdpa", "reference", *(() if why() else ("cpp",)))
everywhere = pytest.mark.parametrize(("far", "heads"), [(f, h) for f in FAR for h in HEADS])


@functools.lru_cache(64)
def model_of(chunk: int = CHUNK, kernels: str = "auto", beside: str = "", **more: Any) -> Any:
    before = {"cla": {}} if beside == "cla" else {"mla": {"factor": "weights", "select": "uniform"}}
    stack = {**(before if beside in ("cla", "mla") else {}), "infllm": {**FIELDS, **more}}
    stack |= {} if beside in ("", "cla", "mla") else {beside: {}}
    return compile_plan(shared(dense()), plan_of(stack, prefill_chunk=chunk), kernels)


@torch.no_grad()
def read(model: Any, ids: Tensor, prompt: int) -> tuple[Tensor, Any]:
    """Logits of a prompt and of one step for each later token, `[B, n, vocabulary]`; the cache."""
    out = model(ids[:, :prompt])
    logits, cache = [out.logits], out.past_key_values
    for t in range(prompt, ids.shape[1]):
        logits.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    return torch.cat(logits, 1), cache


def prompt_of(literal: Literal, ids: Tensor) -> list[Tensor]:
    """Logits of a prompt `[n]`, chunk by chunk."""
    return [literal.read(ids[i : i + CHUNK], True, i + CHUNK >= len(ids)) for i in range(0, len(ids), CHUNK)]


@pytest.mark.parametrize("kernels", BACKENDS)
@everywhere
def test_is_infllm_word_for_word(far: Any, heads: Any, kernels: str) -> None:
    """Chunks of a prompt and decoded tokens; sums of attention by kernels and by the reference."""
    ids = tiny_ids(1, TOKENS + NEW)
    policy = InfLLM(**FIELDS, far=far, heads=heads)
    literal = Literal(dense(), policy)
    expected = prompt_of(literal, ids[0, :TOKENS])
    expected += [literal.read(ids[0, t : t + 1], False) for t in range(TOKENS, TOKENS + NEW)]
    logits, cache = read(model_of(far=far, heads=heads, kernels=kernels), ids, TOKENS)
    assert off(logits[0], torch.cat(expected).float()) < 1e-5
    for layer, of in zip(cache.layers, literal.layers, strict=True):
        table, count = layer.index.table, len(of.blocks)
        assert layer.index.counts == [count] * 2
        blocks = torch.stack(of.blocks, 1).float()
        torch.testing.assert_close(table.representatives[:, :count], blocks, atol=1e-4, rtol=1e-4)
        behind = of.received[:, layer.index.first + layer.index.covered[0] :].float()
        sums = layer.index.received.sums[:, : behind.shape[1]]
        torch.testing.assert_close(sums, behind, atol=1e-4, rtol=1e-4)
        assert next(iter(layer.reading.choices[layer.plan.index].entries)).tolist() == of.chosen[-1]
    furthest = FIELDS["sinks"] + FIELDS["recent"] + FIELDS["block"] + max(CHUNK, FIELDS["every"])
    assert (literal.furthest < furthest) == (far == "constant")
    shift = 0 if cache.shift is None else int(cache.shift[0])
    assert shift == (cache.layers[0].index.covered[0] if far == "constant" else 0)


@pytest.mark.parametrize("heads", HEADS)
def test_choices_of_heads_differ_unless_they_are_shared(heads: Any) -> None:
    _, cache = read(model_of(far="original", heads=heads), tiny_ids(1, TOKENS + 3), TOKENS)
    entries = [layer.reading.choices[layer.plan.index].entries for layer in cache.layers]
    alike = [a.tolist() == b.tolist() for a, b in entries]
    assert all(alike) == (heads == "shared")


@everywhere
def test_a_window_that_holds_everything_is_the_uncompressed_model(far: Any, heads: Any) -> None:
    ids = tiny_ids(2, TOKENS + NEW)
    logits, cache = read(model_of(far=far, heads=heads, recent=TOKENS + NEW), ids, TOKENS)
    torch.testing.assert_close(logits, dense()(ids).logits, atol=3e-5, rtol=1e-5)
    assert cache.index_bytes() == 4 * 4 * 2 * 2 * (TOKENS + NEW - FIELDS["sinks"])


@pytest.mark.parametrize("heads", HEADS)
def test_blocks_enough_for_everything_are_the_uncompressed_model(heads: Any) -> None:
    """Beyond the window: every past token is attended to once, at its own distance."""
    ids = tiny_ids(2, TOKENS + NEW)
    logits, cache = read(model_of(far="original", heads=heads, budget=1000), ids, TOKENS)
    torch.testing.assert_close(logits, dense()(ids).logits, atol=3e-5, rtol=1e-5)
    for layer in cache.layers:
        assert layer.index.covered[0] > FIELDS["budget"]
        entries = list(layer.reading.choices[layer.plan.index].entries)
        assert [row.tolist() for row in entries] == [list(range(TOKENS + NEW))] * 4


def test_blocks_at_one_distance_are_another_model() -> None:
    ids = tiny_ids(1, TOKENS)
    a, b = (read(model_of(far=far, heads="own", budget=1000), ids, TOKENS)[0] for far in FAR)
    assert off(a, b) > 0.01


@everywhere
def test_a_padded_batch_is_its_sequences_alone(far: Any, heads: Any) -> None:
    """Rotary positions lie behind true ones by what each sequence has in blocks."""
    lengths, new = (TOKENS, 41, 23, 3), 20
    ids, mask = tiny_ids(4, TOKENS + new), torch.zeros(4, TOKENS, dtype=torch.long)
    for b, n in enumerate(lengths):
        mask[b, TOKENS - n :] = 1
    model = model_of(far=far, heads=heads)
    with torch.no_grad():
        cache, logits = model(ids[:, :TOKENS], attention_mask=mask).past_key_values, []
        for t in range(TOKENS, TOKENS + new):
            mask = torch.cat((mask, torch.ones(4, 1, dtype=torch.long)), 1)
            logits.append(model(ids[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
    for b, n in enumerate(lengths):
        alone, single = read(model, ids[b : b + 1, TOKENS - n :], n)
        assert off(torch.cat(logits, 1)[b], alone[0, n:]) < 1e-4
        if far == "constant" and single.shift is not None:
            assert int(cache.shift[b]) == int(single.shift[0])


def test_a_thousand_tokens_lose_nothing() -> None:
    """Every position is there once, in the sinks, in a block or behind; keys behind it follow the sinks."""
    ids = tiny_ids(1, 1040)
    model = model_of(far="constant", heads="shared", recent=32)
    with torch.no_grad():
        cache = model(ids[:, :40]).past_key_values
        for t in range(40, 1040):
            model(ids[:, t : t + 1], past_key_values=cache, logits_to_keep=1)
    for layer in cache.layers:
        index = layer.index
        assert [row[2].tolist() for row in layer.held.rows()] == [list(range(1040))] * 2
        spans = zip(index.table.starts[0].tolist(), index.table.sizes[0].tolist(), strict=True)
        entries = [*range(index.first), *(e for start, size in spans for e in range(start, start + size))]
        assert entries == list(range(index.first + index.covered[0]))
        assert 32 <= 1040 - len(entries) < 32 + FIELDS["every"] + FIELDS["block"]
    assert int(cache.shift) == cache.layers[0].index.covered[0]


@pytest.mark.parametrize("beside", ["", "paged", "offload", "cla", "mla"])
@pytest.mark.parametrize("far", FAR)
def test_bytes_are_the_planned_ones(far: Any, beside: str) -> None:
    """Groups, and what was received, are in them."""
    for chunk in (0, CHUNK):
        model = model_of(chunk, far=far, heads="shared", beside=beside)
        for tokens in (1, 5, 30, TOKENS):
            rows, _ = prove(model, tiny_ids(1, tokens))  # raises where they differ
        assert any(row.index_bytes for row in rows)


@pytest.mark.parametrize("beside", ["paged", "offload"])
@everywhere
def test_where_tokens_lie_changes_nothing(far: Any, heads: Any, beside: str) -> None:
    """Keys are turned in pages, and in host memory."""
    ids = tiny_ids(2, TOKENS + NEW)
    expected, _ = read(model_of(far=far, heads=heads), ids, TOKENS)
    got, _ = read(model_of(far=far, heads=heads, beside=beside), ids, TOKENS)
    assert off(got, expected) < 1e-5


@pytest.mark.parametrize("beside", ["", "paged"])
@pytest.mark.parametrize("far", FAR)
def test_forks_and_beams_go_their_own_way(far: Any, beside: str) -> None:
    """One of them turns its keys while the other goes on as if alone."""
    ids = tiny_ids(2, TOKENS + NEW)
    model = model_of(far=far, heads="shared", beside=beside)
    expected, _ = read(model, ids, TOKENS)
    with torch.no_grad():
        cache = model(ids[:, :TOKENS]).past_key_values
        fork = cache.fork()
        for t in range(NEW):
            model(ids[:, t : t + 1], past_key_values=fork)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        logits = [model(ids.flip(0)[:, t : t + 1], past_key_values=cache).logits for t in range(TOKENS, TOKENS + NEW)]
    assert off(torch.cat(logits, 1).flip(0), expected[:, TOKENS:]) < 1e-5


@pytest.mark.parametrize("far", FAR)
def test_a_second_prompt_goes_on(far: Any) -> None:
    """In chunks of its own, the first of which finds the blocks of the first prompt."""
    ids, model = tiny_ids(1, TOKENS + NEW), model_of(far=far, heads="shared")
    literal = Literal(dense(), InfLLM(**FIELDS, far=far, heads="shared"))
    expected = prompt_of(literal, ids[0, :TOKENS]) + prompt_of(literal, ids[0, TOKENS:])
    with torch.no_grad():
        out = model(ids[:, :TOKENS])
        again = model(ids[:, TOKENS:], past_key_values=out.past_key_values)
    assert off(torch.cat((out.logits, again.logits), 1)[0], torch.cat(expected).float()) < 1e-5


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    ids = tiny_ids(1, TOKENS + NEW)
    model = assemble(shared(dense()), finish(Config(stack={"infllm": FIELDS}, prefill_chunk=CHUNK)))
    loaded = artifact.load(artifact.save(model, tmp_path / "artifact"))
    assert torch.equal(read(loaded, ids, TOKENS)[0], read(model, ids, TOKENS)[0])
    assert loaded.kvcompile.plan == model.kvcompile.plan


@pytest.mark.parametrize("before", ["snapkv", "h2o"])
def test_after_a_selection_blocks_are_of_what_it_kept(before: str) -> None:
    """Column sums follow their entries, whoever else adds them up; a second prompt selects and groups anew."""
    own = {"window": 8, "kernel": 3} if before == "snapkv" else {}
    stack = {before: {**own, "budget": 50, "decode_every": 0, "sinks": 2}}
    stack["infllm"] = {**FIELDS, "far": "original", "heads": "own", "budget": 1000}
    ids = tiny_ids(1, TOKENS + NEW)
    model = compiled(stack, prefill_chunk=CHUNK)
    without = compiled({before: stack[before]}, prefill_chunk=CHUNK)
    got, cache = read(model, ids, TOKENS)
    expected, _ = read(without, ids, TOKENS)
    assert off(got, expected) < 1e-5
    with torch.no_grad():
        second = [m(ids[:, :30], past_key_values=c).logits for m, c in ((model, cache), (without, _))]
    assert off(second[0], second[1]) < 1e-5
    assert cache.layers[0].index.covered[0]


def test_representatives_are_means_of_the_strongest_keys() -> None:
    """Of equally strong ones the older; blocks of whole units where tokens share scales."""
    keys, received = torch.randn(3, 48, 5), torch.randint(0, 4, (3, 48)).float()
    for unit, size in ((1, 6), (4, 12)):
        groups = Blocks(6, 3).divide(Entries(keys, unit, received=received))
        assert groups.order is None
        assert torch.equal(groups.sizes, torch.full((3, 48 // size), size))
        assert Blocks(6, 3).count(48, unit) == 48 // size
        for r in range(3):
            for g in range(48 // size):
                block = range(g * size, (g + 1) * size)
                best = sorted(block, key=lambda j: (-float(received[r, j]), j))[:3]
                torch.testing.assert_close(groups.representatives[r, g], keys[r, best].mean(0))


@pytest.mark.parametrize(("dtype", "within"), [("bfloat16", 0.02), ("float16", 0.002), ("float32", 1e-6)])
def test_keys_that_move_up_often_are_rounded_a_little(dtype: str, within: float) -> None:
    """32 moves take a key through the paper's window while tokens are decoded."""
    rotary = dense_rotary()
    keys, at = torch.randn(64, 16).to(getattr(torch, dtype)), torch.arange(64) + 4096
    moved = keys
    for move in range(32):
        moved = turn(moved, at - 128 * move, at - 128 * (move + 1), rotary)
    once = turn(keys.float(), at, at - 4096, rotary)
    assert off(moved.float(), once) < within


def dense_rotary() -> Any:
    """The rotation of a tiny llama."""
    return architecture_of(dense().config).rotary(dense(), 0)


@pytest.mark.parametrize(
    ("stack", "architecture", "says"),
    [
        ({"infllm": FIELDS, "kivi": {"residual": 8, "group": 8}}, "llama", "stored plain"),
        ({"infllm": FIELDS, "rotate": {}}, "llama", "stored plain"),
        ({"streaming": {"decode_every": 0}, "infllm": FIELDS}, "llama", "'streaming', which drops"),
        ({"infllm": {**FIELDS, "skip_layers": [0, 1]}}, "llama", "layer 0, which reads all"),
        ({"infllm": FIELDS}, "gemma2", "attends to a sliding window"),
        ({"adakv": {"decode_every": 0}, "infllm": {**FIELDS, "far": "original"}}, "llama", "equally many tokens"),
        ({"infllm": {**FIELDS, "strongest": 9}}, "llama", "strongest"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(stack: Any, architecture: str, says: str) -> None:
    with pytest.raises(KvcompileError, match=says) as caught:
        plan_of(stack, architecture, prefill_chunk=CHUNK)
    assert "\n" not in str(caught.value)


def test_a_layer_without_positions_may_read_everything() -> None:
    """SmolLM3: nothing of it turns."""
    stack = {"infllm": {**FIELDS, "skip_layers": [3]}}
    model = compile_plan(shared(dense("smollm3")), plan_of(stack, "smollm3", prefill_chunk=CHUNK))
    assert read(model, tiny_ids(1, TOKENS + 3), TOKENS)[0].isfinite().all()
