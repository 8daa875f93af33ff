"""What every storage policy promises, alone and behind a selection: no token lost, bytes as planned, exact crops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contract_table import (
    DIM,
    HEADS,
    KIVI8,
    LAYERS,
    STORED,
    Options,
    compiled,
    dense,
    kept_positions,
    off,
    stored_bytes,
)
from test_contract import steps
from tiny import tiny_ids, tiny_model
from torch import Tensor

from kvcompile.artifact import artifact
from kvcompile.compiler import assemble
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.proof import prove
from kvcompile.kernels.codecs import decode, encode
from kvcompile.models.sharing import shared
from kvcompile.plan.storage import FLUSH, Storage
from kvcompile.stores.encoded.hadamard import turn_basis

TOKENS, NEW = 60, 70  # far enough to encode twice while decoding, from any residual below
every = pytest.mark.parametrize(("stack", "logits"), STORED.values(), ids=STORED)


def rounded(x: Tensor, codec: Any, rotated: bool) -> Tensor:
    """What is left of `x [..., n, D]` after a codec, in the Hadamard basis or not."""
    if rotated:
        return turn_basis(rounded(turn_basis(x), codec, False))
    return x if codec is None else decode(*encode(x, codec), codec, x.dtype)


def simulated(architecture: str, storage: list[Storage], ids: Tensor, prompt: int) -> Tensor:
    """Logits of transformers with its own full cache, in which old tokens are replaced by what their codes say."""
    model, logits, encoded = dense(architecture), [], [0] * LAYERS
    with torch.no_grad():
        out = model(ids[:, :prompt], use_cache=True)
        logits.append(out.logits)
        for t in range(prompt, ids.shape[1]):
            for i, (layer, s) in enumerate(zip(out.past_key_values.layers, storage, strict=True)):
                old = encoded[i]
                loose = t - old
                if s.quantized and loose >= s.residual + s.block and (t == prompt or (t - prompt + i) % FLUSH == 0):
                    encoded[i] = stop = old + s.encoded(loose)
                    for x, codec in ((layer.keys, s.key), (layer.values, s.value)):
                        x[:, :, old:stop] = rounded(x[:, :, old:stop], codec, s.rotated)
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, 1)


@every
def test_the_model_computes_with_what_the_codes_say(stack: Options, logits: float) -> None:
    """To rounding: prefill is exact, then old tokens are encoded as planned, over several flushes."""
    ids = tiny_ids(2, TOKENS + NEW)
    model = compiled(stack, kernels="sdpa")
    got, cache = steps(model, ids, TOKENS)
    expected = simulated("llama", [p.storage for p in model.kvcompile.plan.layers], ids, TOKENS)
    assert off(got, expected) < 5e-4  # another order of sums now and then makes another code
    # queries and weights of 16 bits make another one more often
    assert off(steps(compiled(stack), ids, TOKENS)[0], expected) < 5e-3
    assert min(cache.layers[0].held.encoded) > TOKENS, "some decoded tokens must have been encoded"
    uncompressed, _ = steps(dense(), ids, TOKENS)
    assert torch.equal(got[:, :TOKENS].argmax(-1), uncompressed[:, :TOKENS].argmax(-1))
    assert 1e-5 < off(got[:, TOKENS:], uncompressed[:, TOKENS:]) < logits


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "phi3", "gpt_neox", "gpt_oss"])
def test_the_same_on_other_architectures(architecture: str) -> None:
    """Layers with a sliding window are left as they are; where all have one there is nothing to store."""
    ids = tiny_ids(2, TOKENS + NEW)
    if architecture == "phi3":
        with pytest.raises(KvcompileError, match="some layer must see the whole context"):
            compiled(KIVI8, architecture)
        return
    model = compiled(KIVI8, architecture, kernels="sdpa")
    plan = model.kvcompile.plan
    assert [p.storage.quantized for p in plan.layers] == [p.sliding_window is None for p in plan.layers]
    expected = simulated(architecture, [p.storage for p in plan.layers], ids, TOKENS)
    got, _ = steps(model, ids, TOKENS)
    # a sliding layer's own cache in transformers and ours hold different tokens, hence another order of sums
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tokens", [1, 3, 8, 11, 12, 13, TOKENS])
@every
def test_measured_bytes_are_the_planned_ones(stack: Options, logits: float, tokens: int) -> None:
    """To the byte, for prompts shorter than the residual, at its border and longer."""
    for architecture in ("llama", "gemma2"):
        model = compiled(stack, architecture)
        rows, _ = prove(model, tiny_ids(1, tokens))
        assert [r.bytes for r in rows] == [r.planned_bytes for r in rows]
        with torch.no_grad():
            cache = model(tiny_ids(3, tokens), logits_to_keep=1).past_key_values
        assert cache.nbytes() == sum(r.bytes for r in model.kvcompile.plan.bytes(3, tokens))


def test_measured_bytes_are_the_planned_ones_in_bfloat16() -> None:
    stack = {"kivi": {"bits": 2, "group": 8, "residual": 16}}
    model = assemble(tiny_model().to(torch.bfloat16), finish(Config(stack=stack)))
    rows, _ = prove(model, tiny_ids(1, TOKENS))
    # of 60 tokens 40 are encoded: 2 bits, and per group of 8 two float16 numbers (keys by channel, values by token)
    per_row = 40 * DIM * 2 // 8 * 2 + 2 * (40 * DIM // 8) * 2 * 2 + 2 * 20 * DIM * 2
    assert [r.bytes for r in rows] == [HEADS * per_row] * LAYERS


@every
def test_no_token_is_lost_or_moved(stack: Options, logits: float) -> None:
    """A padded batch decoded over residual and room: every true position is there, in order, in every row."""
    ids, mask = tiny_ids(3, TOKENS), torch.ones(3, TOKENS, dtype=torch.long)
    mask[1, :13], mask[2, :57] = 0, 0
    cache = (
        compiled(stack)
        .generate(
            ids,
            attention_mask=mask,
            max_new_tokens=2 * NEW,
            min_new_tokens=2 * NEW,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        .past_key_values
    )
    true = [n for n in (60, 47, 3) for _ in range(HEADS)]
    assert kept_positions(cache) == [[list(range(n + 2 * NEW - 1)) for n in true]] * LAYERS
    for layer in cache.layers:
        storage = layer.plan.storage
        assert all(0 <= n - storage.residual < storage.block + FLUSH for n in layer.held.residual.lengths)


@every
def test_a_batch_is_what_its_sequences_are_alone(stack: Options, logits: float) -> None:
    ids, pads = tiny_ids(3, TOKENS + NEW), (0, 13, 57)
    mask = torch.ones(3, TOKENS + NEW, dtype=torch.long)
    for b, n in enumerate(pads):
        mask[b, :n] = 0
    model = compiled(stack)
    with torch.no_grad():
        # codes are of rotated keys, so rotary positions must be those without padding, as `generate` gives them
        at = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(ids[:, :TOKENS], attention_mask=mask[:, :TOKENS], position_ids=at[:, :TOKENS])
        for t in range(TOKENS, TOKENS + NEW):
            new, seen = slice(t, t + 1), mask[:, : t + 1]
            out = model(ids[:, new], seen, at[:, new], past_key_values=out.past_key_values)
    for b, n in enumerate(pads):
        alone, cache = steps(model, ids[b : b + 1, n:], TOKENS - n)
        assert off(out.logits[b, -1], alone[0, -1]) < 1e-3  # another order of sums now and then makes another code
        for mine, other in zip(out.past_key_values.layers, cache.layers, strict=True):
            assert mine.held.encoded[b * HEADS : (b + 1) * HEADS] == other.held.encoded


def test_memory_is_given_back_when_a_prompt_is_encoded() -> None:
    """No float copy of the prompt survives, and flushes while decoding let nothing grow but the codes."""
    tokens = 480
    model = compiled({"kivi": {"group": 8, "residual": 16}})
    with torch.no_grad():
        cache = model(tiny_ids(1, tokens), logits_to_keep=1).past_key_values
        at_first = [layer.held.residual.allocated() for layer in cache.layers]
        for t in range(100):
            model(tiny_ids(1, 1, t), past_key_values=cache)
    rows, room = LAYERS * HEADS, 2 * 64 * (2 * DIM * 4 + 4)
    alive = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in layer.held.tensors())
    assert alive == cache.allocated() <= cache.nbytes() + sum(sum(n) for n in cache.lengths()) * 4 + rows * room
    assert [layer.held.residual.allocated() for layer in cache.layers] == at_first
    assert cache.allocated() < 0.5 * rows * (tokens + 100) * 2 * DIM * 4


def test_layers_take_turns_to_encode_what_was_decoded() -> None:
    """Each once in so many tokens, all its rows together, no two layers at one token."""
    ids = tiny_ids(2, TOKENS + 2 * FLUSH)
    model = compiled(STORED["int8"][0])
    with torch.no_grad():
        cache = model(ids[:, :TOKENS]).past_key_values
        before, moved = [layer.held.encoded for layer in cache.layers], []
        for t in range(TOKENS, ids.shape[1]):
            model(ids[:, t : t + 1], past_key_values=cache)
            now = [layer.held.encoded for layer in cache.layers]
            moved += [(t - TOKENS + 1, i) for i in range(LAYERS) if now[i] != before[i]]
            before = now
    assert moved == [(turn * FLUSH - i, i) for turn in (1, 2) for i in reversed(range(LAYERS))]


def test_a_selection_waits_for_the_last_chunk_and_so_does_the_encoding() -> None:
    """Without selections between chunks a prompt in pieces gives the very cache of a prompt at once."""
    stack: Options = {"snapkv": {"budget": 24, "window": 8, "between_chunks": False}, **KIVI8}
    ids = tiny_ids(2, TOKENS)
    once, pieces = (compiled(stack, prefill_chunk=chunk) for chunk in (0, 16))
    with torch.no_grad():
        expected, got = (m(ids, logits_to_keep=1) for m in (once, pieces))
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert kept_positions(got.past_key_values) == kept_positions(expected.past_key_values)
    assert got.past_key_values.nbytes() == expected.past_key_values.nbytes()


@pytest.mark.parametrize("chunk", [1, 7, 16])
@every
def test_a_prompt_in_chunks_ends_in_the_planned_bytes(stack: Options, logits: float, chunk: int) -> None:
    """Each chunk is encoded when it has been read, so that the peak is bounded; later chunks read codes."""
    for before in ({}, {"snapkv": {"budget": 24, "window": 4, "kernel": 1}}):
        model = compiled({**before, **stack}, kernels="sdpa", prefill_chunk=chunk)
        rows, _ = prove(model, tiny_ids(1, TOKENS))
        assert [r.bytes for r in rows] == [r.planned_bytes for r in rows]


@pytest.mark.parametrize("side", ["left", "right"])
@every
def test_chunks_of_a_padded_batch_are_encoded_as_those_of_its_sequences(
    stack: Options, logits: float, side: str
) -> None:
    """Later chunks read codes, so that it matters where a sequence is cut: batch N is N times batch 1."""
    model, ids, lengths = compiled(stack, kernels="sdpa", prefill_chunk=16), tiny_ids(3, TOKENS), (TOKENS, 41, 23)
    mask = torch.zeros_like(ids)
    places = [slice(TOKENS - n, TOKENS) if side == "left" else slice(n) for n in lengths]
    for b, place in enumerate(places):
        mask[b, place] = 1
    with torch.no_grad():
        together = model(ids, attention_mask=mask)
        for b, place in enumerate(places):
            alone = model(ids[b : b + 1, place])
            torch.testing.assert_close(together.logits[b : b + 1, place], alone.logits, atol=1e-4, rtol=1e-4)
            rows = [per_layer[b * HEADS : (b + 1) * HEADS] for per_layer in kept_positions(together.past_key_values)]
            assert rows == kept_positions(alone.past_key_values)


@pytest.mark.parametrize("stack", [KIVI8, STORED["int8"][0]], ids=["kivi", "int8"])
def test_crop_is_exact_or_refused(stack: Options) -> None:
    ids = tiny_ids(1, TOKENS + 60)
    model = compiled(stack)
    with torch.no_grad():
        cache = model(ids[:, :TOKENS]).past_key_values
        with pytest.raises(KvcompileError, match="encoding"):
            cache.crop(-1)  # the prompt was encoded
        last = None
        for t in range(TOKENS, TOKENS + 12):
            last = model(ids[:, t : t + 1], past_key_values=cache).logits
        cache.crop(-5)
        for t in range(TOKENS + 7, TOKENS + 12):
            again = model(ids[:, t : t + 1], past_key_values=cache).logits
        assert torch.equal(again, last)
        for t in range(TOKENS + 12, TOKENS + 40):
            model(ids[:, t : t + 1], past_key_values=cache)
            held = cache.layers[0].held
            assert cache.croppable <= min(held.residual.lengths)
        with pytest.raises(KvcompileError, match="encoding"):
            cache.crop(-30)


@every
def test_what_is_loaded_is_what_was_saved(stack: Options, logits: float, tmp_path: Path) -> None:
    """To the bit, over a flush."""
    ids = tiny_ids(1, TOKENS + NEW)
    model = assemble(shared(dense()), finish(Config(stack=stack, prefill_chunk=32)))
    loaded = artifact.load(artifact.save(model, tmp_path / "artifact"))
    (expected, _), (got, _) = (steps(m, ids, TOKENS) for m in (model, loaded))
    assert torch.equal(got, expected)
    assert loaded.kvcompile.plan == model.kvcompile.plan
    assert all(f"flush_{i}" in (tmp_path / "artifact/graph.txt").read_text() for i in range(1, LAYERS))
    text = (tmp_path / "artifact/kernels/layers.md").read_text()
    assert model.kvcompile.plan.layers[0].storage.key.name in text


def test_beams_share_and_part() -> None:
    """Beam search repeats and reorders quantized rows; with codes of 8 bits it finds what transformers finds."""
    ids = tiny_ids(2, TOKENS)
    options = {"max_new_tokens": 50, "min_new_tokens": 50, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    model = compiled({"kivi": {"bits": 8, "group": 1, "residual": 8}})
    got = model.generate(ids, attention_mask=mask, **options)
    expected = dense().generate(ids, attention_mask=mask, **options)
    assert torch.equal(got[:, : TOKENS + 10], expected[:, : TOKENS + 10])
    assert got.shape == expected.shape


def test_selections_while_decoding_encode_again_what_they_touch() -> None:
    """Every few tokens something is dropped from codes: bytes and positions stay what the rows' lengths say."""
    for stored in (KIVI8, STORED["int8"][0]):
        stack: Options = {"snapkv": {"budget": 24, "window": 4, "kernel": 1, "decode_every": 8}, **stored}
        ids = tiny_ids(2, TOKENS + 80)
        with torch.no_grad():
            cache = compiled(stack)(ids[:, :TOKENS], logits_to_keep=1).past_key_values
            model = compiled(stack)
            for t in range(TOKENS, ids.shape[1]):
                model(ids[:, t : t + 1], past_key_values=cache)
                for layer in kept_positions(cache):
                    assert all(at == sorted(set(at)) and at[-1] == t for at in layer)
        flushed = [p.storage.nbytes(24, DIM, "float32") * 2 * HEADS for p in cache.plan.layers]
        assert cache.tick % 8 == 0
        assert stored_bytes(cache) == flushed
        assert cache.nbytes() <= sum(flushed) + 2 * HEADS * LAYERS * FLUSH * 2 * DIM * 4
