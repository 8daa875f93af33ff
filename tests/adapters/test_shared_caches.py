"""Layers that read the keys and values of earlier ones in the model itself, and heads of two sizes: gemma3n, gemma4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_config, family_model
from programs import stepped
from tiny import tiny_ids, tiny_tokenizer

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.errors import KvcompileError
from kvcompile.exporters.static.capacity import Limits
from kvcompile.exporters.static.lower import Program
from kvcompile.graph import ops
from kvcompile.graph.wiring import observes, wiring

TOKENS = 40
BOTH = ["gemma3n_text", "gemma4_text"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def compiled(name: str, *overrides: str, **over: Any) -> Any:
    model = family_model(name, **over)
    return kvcompile.compile(model, tokenizer=tiny_tokenizer(), overrides=["kernels=sdpa", *overrides])


@pytest.mark.parametrize("name", BOTH)
def test_readers_are_edges_and_their_owner_sees_the_queries_of_all(name: str) -> None:
    """What is dropped, is dropped once, for all readers: one selection an owner, by twice the query heads."""
    model = compiled(name, "policy=[snapkv]", "budget=12", "stack.snapkv.window=4")
    graph = model.kvcompile.graph.graph
    assert wiring(graph) == {0: 0, 1: 1, 2: 0, 3: 1}
    assert sorted(observes(graph)) == [0, 1]
    for node in observes(graph).values():
        assert node.args[1].target is ops.together
        assert len(node.args[1].args) == 3  # the cache, then a layer's queries each
    lengths = model(tiny_ids(1, TOKENS)).past_key_values.lengths()
    assert [len(rows) for rows in lengths] == [2, 2, 0, 0]
    assert not any(hasattr(layer.self_attn, "k_proj") for layer in model.model.layers[2:])


@pytest.mark.parametrize("name", BOTH)
def test_bytes_are_those_of_owners_uncompressed_too(name: str) -> None:
    model, ids = compiled(name, "policy=[]"), tiny_ids(1, TOKENS)
    rows = model.kvcompile.plan.bytes(1, TOKENS)
    wide = 24 if name == "gemma4_text" else 16
    expected = [2 * 2 * 16 * 16 * 4, 2 * 2 * wide * TOKENS * 4, 0, 0]  # keys and values, KV heads, channels, tokens
    assert [row.bytes for row in rows] == [row.dense_bytes for row in rows] == expected
    assert model(ids).past_key_values.nbytes() == sum(row.bytes for row in rows)
    assert rows[3].read == rows[1].read > 0


@pytest.mark.parametrize(
    "over",
    [
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        {"num_kv_shared_layers": 0},
        {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        {"use_bidirectional_attention": "vision", "use_double_wide_mlp": True},
    ],
    ids=lambda over: next(iter(over)),
)
def test_other_shapes_of_gemma4(over: dict[str, Any]) -> None:
    ids = tiny_ids(2, TOKENS)
    model, original = compiled("gemma4_text", "policy=[]", **over), family_model("gemma4_text", **over)
    cache = model(ids[:, :-2]).past_key_values
    got = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in (TOKENS - 2, TOKENS - 1)]
    torch.testing.assert_close(torch.cat(got, 1), original(ids).logits[:, -2:], rtol=1e-5, atol=5e-5)


def test_attention_both_ways_is_refused() -> None:
    with pytest.raises(KvcompileError, match="causal"):
        describe(family_config("gemma4_text", use_bidirectional_attention="all"))


@pytest.mark.parametrize("name", BOTH)
def test_embeddings_cannot_stand_for_the_ids_that_layers_read(name: str) -> None:
    model, ids = compiled(name, "policy=[]"), tiny_ids(1, 5)
    with pytest.raises(KvcompileError, match="embed_tokens_per_layer"):
        model(inputs_embeds=model.get_input_embeddings()(ids))


def test_hidden_states() -> None:
    """Of gemma3n they are stacks."""
    ids = tiny_ids(1, 9)
    got = compiled("gemma4_text", "policy=[]")(ids, output_hidden_states=True).hidden_states
    expected = family_model("gemma4_text")(ids, output_hidden_states=True).hidden_states
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(KvcompileError, match="one state of each token"):
        compiled("gemma3n_text", "policy=[]")(ids, output_hidden_states=True)


@pytest.mark.parametrize(
    ("policy", "says"),
    [("cla", "shared only once.*model whose layers share"), ("gqa", "layouts that are known"), ("mla", "q/k norms")],
)
def test_weights_stay_as_they_are(policy: str, says: str) -> None:
    with pytest.raises(KvcompileError, match=says):
        compiled("gemma4_text", f"policy=[{policy}]")


def test_as_a_program_and_as_a_checkpoint(tmp_path: Path) -> None:
    model, ids = compiled("gemma4_text", "policy=[snapkv]", "stack.snapkv.window=8", "budget=0.5"), tiny_ids(2, TOKENS)
    program = Program(model, Limits(batch=2, prompt=TOKENS, new=4))
    expected, _ = stepped(model, ids, 4)
    logits, state = program.prefill(ids)
    got = [logits[:, -1]]
    for token in expected[:, :-1].argmax(-1).unbind(1):
        got.append(program.decode(token[:, None], state)[:, -1])
    torch.testing.assert_close(torch.stack(got, 1), expected, atol=2e-4, rtol=1e-4)

    from transformers import AutoModelForCausalLM

    kvcompile.export(compiled("gemma4_text", "policy=[]"), "hf", tmp_path / "hf", tokenizer=tiny_tokenizer())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(stock(ids).logits, family_model("gemma4_text")(ids).logits)


def test_a_plan_says_that_the_model_shares() -> None:
    layers = describe(family_config("gemma4_text")).to_json()["layers"]
    assert [layer.get("shared") for layer in layers] == [None, None, True, True]
