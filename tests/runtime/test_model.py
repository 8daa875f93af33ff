"""A compiled model is still its transformers class: same answers under the identity plan, clear refusals otherwise."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, tiny_ids, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import DynamicCache, pipeline
from transformers.generation.streamers import BaseStreamer

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.policies.expected_attention import ExpectedAttention
from kvcompile.policies.snapkv import SnapKV
from kvcompile.runtime.cache import KVCache

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "beam": {"num_beams": 3},
    "beam-sampling": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams-returned": {"num_beams": 4, "num_return_sequences": 2},
}


def compiled(name: str = "llama", policy: Any = None, chunk: int = 0, **over: Any) -> Any:
    model = tiny_model(name, **over)
    plan = replace(describe(model.config), prefill_chunk=chunk)
    return compile_plan(model, policy.apply(plan) if policy else plan)


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def identity() -> Any:
    return compiled()


@pytest.fixture(scope="module")
def chunked() -> Any:
    return compiled(chunk=5)


def left_padded(tokens: int = 30) -> tuple[Tensor, Tensor]:
    ids, mask = tiny_ids(3, tokens), torch.ones(3, tokens, dtype=torch.long)
    for b, pads in enumerate((0, 7, 19)):
        ids[b, :pads], mask[b, :pads] = 0, 0
    return ids, mask


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **{**GREEDY, **options})


POLICIES = {
    "dense": None,
    "snapkv": SnapKV(budget=0.5, window=4, between_chunks=False),
    "moments": ExpectedAttention(budget=0.5, between_chunks=False),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunk", [0, 7])
def test_a_padded_batch_without_positions_equals_single_runs(policy: str, chunk: int) -> None:
    """True positions come from the mask, and later from the cache: padding moves no token, and no statistics of it."""
    model, (ids, mask) = compiled(policy=POLICIES[policy], chunk=chunk), left_padded()
    more = tiny_ids(3, 4, seed=1)
    with torch.no_grad():
        first = model(ids, attention_mask=mask)
        cache = first.past_key_values
        held = [[p.tolist() for _, _, p in layer.held.rows()] for layer in cache.layers]
        later = model(more, past_key_values=cache)
        for b in range(3):
            alone = model(ids[b : b + 1][:, mask[b] == 1])
            torch.testing.assert_close(first.logits[b : b + 1][:, mask[b] == 1], alone.logits, atol=1e-4, rtol=1e-4)
            for layer, rows in zip(alone.past_key_values.layers, held, strict=True):
                assert [p.tolist() for _, _, p in layer.held.rows()] == rows[2 * b : 2 * b + 2]
            then = model(more[b : b + 1], past_key_values=alone.past_key_values)
            torch.testing.assert_close(later.logits[b : b + 1], then.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_generates_like_the_original(mode: str, original: Any, identity: Any) -> None:
    ids, mask = left_padded()
    expected = generate(original, ids, mask, **MODES[mode])
    assert torch.equal(generate(identity, ids, mask, **MODES[mode]), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_generates_like_the_original(name: str) -> None:
    ids, mask = left_padded()
    expected = generate(tiny_model(name), ids, mask, num_beams=2, max_new_tokens=4)
    assert torch.equal(generate(compiled(name, chunk=7), ids, mask, num_beams=2, max_new_tokens=4), expected)


def test_class_config_and_weights_are_kept(original: Any, identity: Any) -> None:
    assert type(identity).__name__ == "LlamaForCausalLM"
    assert isinstance(identity, type(original))
    assert identity.config.to_dict() == original.config.to_dict()
    before, after = original.state_dict(), identity.state_dict()
    assert list(before) == list(after)
    for name, weight in after.items():
        assert torch.equal(weight, before[name])


def test_weights_are_shared_with_the_graph(identity: Any) -> None:
    """Training, quantising or moving the model must reach what the graph runs."""
    in_graph = {id(p) for p in identity.kvcompile.graph.parameters()}
    assert {id(p) for p in identity.parameters()} == in_graph


def test_streams_token_by_token(identity: Any) -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.pieces.append(value.flatten())

        def end(self) -> None:
            self.ended = True

    ids, streamer = tiny_ids(1, 9), Collector()
    whole = generate(identity, ids, streamer=streamer)
    assert streamer.ended
    assert [len(p) for p in streamer.pieces] == [9] + [1] * 12
    assert torch.equal(torch.cat(streamer.pieces), whole[0])


def test_text_generation_pipeline(original: Any) -> None:
    policy = SnapKV(budget=0.5, window=4)
    prompts = [" ".join(f"w{i}" for i in tiny_ids(1, n, seed=n)[0].tolist()) for n in (12, 25)]

    def answers(model: Any, batch: int) -> list[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the pipeline's own: generation config beside arguments
            pipe = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer(), batch_size=batch)
            pipe.tokenizer.padding_side = "left"
            found = pipe(prompts, max_new_tokens=6, do_sample=False, return_full_text=False)
        return [text[0]["generated_text"] for text in found]

    assert answers(compiled(), 1) == answers(original, 1)
    compressed = compiled(policy=policy)
    assert answers(compressed, 2) == answers(compressed, 1)


@pytest.mark.parametrize("chunk", [0, 5])
def test_turns_of_a_chat_on_one_cache(chunk: int, original: Any, identity: Any, chunked: Any) -> None:
    model = chunked if chunk else identity
    cache, history = model.new_cache(), tiny_ids(1, 11)
    for turn in range(3):
        expected = generate(original, history)
        history = generate(model, history, past_key_values=cache)
        assert torch.equal(history, expected)
        assert cache.get_seq_length() == history.shape[1] - 1
        history = torch.cat((history, tiny_ids(1, 4, seed=turn + 1)), 1)


@pytest.mark.parametrize("cuts", [[0, 20], [0, 1, 20], [0, 12, 13, 20]])
def test_logits_in_pieces(cuts: list[int], original: Any, identity: Any) -> None:
    ids, cache, pieces = tiny_ids(2, 20), identity.new_cache(), []
    with torch.no_grad():
        for a, b in pairwise(cuts):
            out = identity(ids[:, a:b], past_key_values=cache)
            assert out.past_key_values is cache
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), original(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize(
    "keep",
    [0, 1, 5, 20, 99, -1, -20, *map(torch.tensor, ([3], [-1, 2], [17, 2, 9])), torch.arange(20) % 3 == 0],
    ids=str,
)
def test_logits_to_keep(keep: Any, chunk: int, original: Any, identity: Any, chunked: Any) -> None:
    ids = tiny_ids(2, 20)
    with torch.no_grad():
        expected = original(ids, logits_to_keep=keep).logits
        got = (chunked if chunk else identity)(ids, logits_to_keep=keep).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_loss(original: Any, identity: Any) -> None:
    ids = tiny_ids(2, 20)
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        assert torch.isclose(identity(ids, labels=labels).loss, original(ids, labels=labels).loss, atol=1e-5)


def test_use_cache_false(original: Any) -> None:
    """Nothing is kept between calls, so nothing is dropped either."""
    model, ids = compiled(policy=SnapKV(budget=0.3, window=4)), tiny_ids(2, 20)
    with torch.no_grad():
        assert model(ids, use_cache=False).past_key_values is None
    assert torch.equal(generate(model, ids, use_cache=False), generate(original, ids, use_cache=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_may_change_after_compiling(dtype: torch.dtype) -> None:
    ids = tiny_ids(2, 20)
    model, reference = compiled().to(dtype), tiny_model().to(dtype)
    with torch.no_grad():
        out = model(ids)
        expected = reference(ids).logits
    assert out.logits.dtype == dtype
    limit = 1e-9 if dtype == torch.float64 else 0.05  # bfloat16 keeps 8 bits, and rounding differs by the kernel
    assert (out.logits - expected).double().square().mean().sqrt() < limit * expected.double().std()
    kinds = {part.key.kind for spec in out.past_key_values.kernels.specs.values() for part in spec.parts}
    assert kinds == {str(dtype).removeprefix("torch.")}


def test_copy_of_a_compiled_model_is_independent(original: Any) -> None:
    model = compiled(policy=SnapKV(budget=0.5, window=4))
    twin = copy.deepcopy(model)
    ids = tiny_ids(1, 20)
    before = generate(model, ids)
    assert torch.equal(generate(twin, ids), before), "the graph went along"
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not ({id(p) for p in model.parameters()} & {id(p) for p in twin.kvcompile.graph.parameters()})
    assert torch.equal(generate(model, ids), before)
    assert not torch.equal(generate(twin, ids), before)


def refusals() -> dict[str, tuple[Any, str]]:
    ids = tiny_ids(1, 8)
    embeds = torch.zeros(1, 8, 64)
    padding = torch.tensor([[1] * 8, [0] * 8])
    two = tiny_ids(2, 8)
    return {
        "embeddings-beside-ids": (lambda m: m(ids, inputs_embeds=embeds), "input_ids or inputs_embeds, got both"),
        "embeddings-of-one-sequence": (
            lambda m: m(inputs_embeds=embeds[0]),
            r"inputs_embeds \[B, Q, hidden\], got \[8, 64",
        ),
        "attentions": (lambda m: m(ids, output_attentions=True), "output_attentions"),
        "generate-attentions": (
            lambda m: generate(m, ids, output_attentions=True, return_dict_in_generate=True),
            "output_attentions",
        ),
        "nothing": (lambda m: m(), "input_ids or inputs_embeds, got neither"),
        "one-dimension": (lambda m: m(ids[0]), r"input_ids \[B, Q\], got \[8\]"),
        "no-token": (lambda m: m(ids[:, :0]), r"new tokens, .*got \[1, 0\]"),
        "second-turn-alone": (
            lambda m: generate(m, ids[:, :4], past_key_values=m(ids).past_key_values),
            "the whole conversation",
        ),
        "foreign-cache": (lambda m: m(ids, past_key_values=DynamicCache()), "its own cache, got DynamicCache"),
        "generate-foreign-cache": (lambda m: generate(m, ids, past_key_values=DynamicCache()), "its own cache"),
        "another-models-cache": (
            lambda m: m(ids, past_key_values=KVCache(replace(m.kvcompile.plan, architecture="other"))),
            "belongs to the model",
        ),
        "generate-batch": (lambda m: m.generate_batch([[5, 6, 7]]), "continuous batching"),
        "continuous-batching": (lambda m: m.init_continuous_batching(), "continuous batching"),
        "static": (lambda m: generate(m, ids, cache_implementation="static"), "brings its own cache"),
        "quantized": (lambda m: generate(m, ids, cache_implementation="quantized"), "brings its own cache"),
        "chunks": (lambda m: generate(m, ids, prefill_chunk_size=4), "prefill_chunk=<tokens>"),
        "only-padding": (lambda m: m(two, attention_mask=padding), "a row of padding only"),
        "generate-only-padding": (lambda m: generate(m, two, padding), "a row of padding only"),
        "4d-mask": (lambda m: m(ids, attention_mask=torch.ones(1, 1, 8, 8)), "padding mask"),
        "short-mask": (lambda m: m(ids, attention_mask=torch.ones(1, 7)), "padding mask"),
        "generate-short-mask": (lambda m: generate(m, ids, torch.ones(1, 5)), "every new token has a position"),
        "long-mask": (lambda m: m(ids, attention_mask=torch.ones(1, 9)), "padding mask"),
        "mask-of-new-tokens": (
            lambda m: m(ids, attention_mask=torch.ones(1, 8), past_key_values=m(ids).past_key_values),
            "padding mask",
        ),
        "another-batch": (lambda m: m(two, past_key_values=m(ids).past_key_values), "one batch, got 2 sequences"),
    }


@pytest.mark.parametrize("what", list(refusals()))
def test_refusals(what: str, chunked: Any) -> None:
    call, message = refusals()[what]
    with pytest.raises(KvcompileError, match=message) as error, torch.no_grad():
        call(chunked)
    assert "\n" not in str(error.value)


def test_only_a_causal_lm_is_compiled() -> None:
    for model, kind in ((torch.nn.Linear(3, 3), "Linear"), (tiny_model().model, "LlamaModel"), (None, "NoneType")):
        with pytest.raises(KvcompileError, match=f"only a causal LM of transformers can be compiled, got {kind}"):
            kvcompile.compile(model, "zigzag")
