"""Models that cache latents themselves: what a row is, how it may be stored, what is refused as there is only one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_config, family_model
from programs import stepped
from tiny import tiny_ids, tiny_tokenizer
from torch import Tensor, nn

import kvcompile
from kvcompile.adapters.architectures import architecture, describe
from kvcompile.adapters.built_in import BUILT_IN
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.exporters.static.capacity import Limits
from kvcompile.exporters.static.lower import Program
from kvcompile.stack import apply_stack, build_stack

TOKENS, RANK, ROPE = 40, 32, 8
NATIVE = [name for name in BUILT_IN if architecture(name).adapter.native]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def compiled(*overrides: str, name: str = "deepseek_v3", kernels: str = "sdpa", **over: Any) -> Any:
    model = family_model(name, **over)
    return kvcompile.compile(model, tokenizer=tiny_tokenizer(), overrides=[f"kernels={kernels}", *overrides])


def next_logits(model: Any, ids: Tensor) -> Tensor:
    """Of the last token, after a prompt of the others."""
    return model(ids[:, -1:], past_key_values=model(ids[:, :-1]).past_key_values).logits


@pytest.mark.parametrize("name", NATIVE)
def test_a_row_is_the_latent_and_the_key_that_turns(name: str) -> None:
    """Its bytes are those of transformers' own cache, uncompressed too."""
    model, ids = compiled("policy=[]", name=name), tiny_ids(2, TOKENS)
    cache = model(ids).past_key_values
    nbytes = 2 * TOKENS * (RANK + ROPE) * 4
    for layer, row in zip(cache.layers, model.kvcompile.plan.bytes(2, TOKENS), strict=True):
        assert layer.held.nbytes() == row.bytes == row.dense_bytes == nbytes
        assert layer.keys.shape == (2, 1, TOKENS, ROPE + RANK)
        assert torch.equal(layer.values, layer.keys[..., ROPE:])
    theirs = family_model(name)(ids).past_key_values
    attending = architecture(name).attending(family_config(name))
    for ours, layer in zip(cache.layers, [theirs.layers[i] for i in attending], strict=True):
        torch.testing.assert_close(ours.values, layer.keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["int8", "nf4", "fp8", "kivi"])
def test_latents_in_few_bits_as_planned(policy: str) -> None:
    """Pages change nothing but where they lie, and bytes are those of the plan: one number format for the row."""
    options = [f"stack.{policy}.residual=4"] if policy != "kivi" else ["stack.kivi.residual=4", "stack.kivi.group=4"]
    whole, ids = compiled("policy=[]"), tiny_ids(1, TOKENS)
    plain, paged = (compiled(f"policy=[{stack}]", *options) for stack in (policy, f"{policy},paged"))
    cache = plain(ids[:, :-1]).past_key_values
    (row, _) = plain.kvcompile.plan.bytes(1, TOKENS - 1)
    assert cache.layers[0].held.nbytes() == row.bytes < 0.5 * row.dense_bytes
    got, expected = next_logits(plain, ids), next_logits(whole, ids)
    assert 0 < (got - expected).square().mean().sqrt() < 0.6 * expected.std()
    assert torch.equal(next_logits(paged, ids), got)


def test_dropped_again_while_encoded() -> None:
    """Rows that were encoded, dropped, and encoded again are still rows of latents."""
    options = ["budget=12", "stack.h2o.decode_every=3", "stack.int8.residual=4"]
    model, ids = compiled("policy=[h2o,int8]", *options), tiny_ids(2, TOKENS)
    cache = model.new_cache()
    model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    for layer in cache.layers:
        store = layer.held
        assert store.residual.latent == ROPE
        keys, values, _ = store.rows()[0]
        assert torch.equal(values, keys[:, ROPE:])


@pytest.mark.parametrize("kernels", ["cpp", "reference"])
def test_every_backend(kernels: str) -> None:
    ids = tiny_ids(2, TOKENS)
    for stack in (["policy=[]"], ["policy=[h2o]", "budget=20"], ["policy=[int8]", "stack.int8.residual=4"]):
        expected = next_logits(compiled(*stack), ids)
        torch.testing.assert_close(next_logits(compiled(*stack, kernels=kernels), ids), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("stack", ["expected_attention", "kvzip", "quest", "offload"])
def test_policies_that_look_at_keys_or_read_again_run(stack: str) -> None:
    options = {"expected_attention": ["budget=20"], "kvzip": ["budget=20"], "quest": ["stack.quest.skip_layers=[]"]}
    model, ids = compiled(f"policy=[{stack}]", *options.get(stack, [])), tiny_ids(1, TOKENS)
    cache = model(ids).past_key_values
    assert cache.nbytes() == sum(row.bytes for row in model.kvcompile.plan.bytes(1, TOKENS))
    assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize(
    ("stack", "says"),
    [
        ("adakv", "no heads to have budgets"),
        ("head_budgets", "no heads to have budgets"),
        ("global_topk", "no heads to have budgets"),
        ("leankv", "no heads to have budgets"),
        ("ghost", "must meet keys, not latent rows"),
        ("rotate", "one number format"),
        ("center", "one number format"),
        ("mla", "only one latent.*caches latents itself"),
        ("gqa", "no KV heads to merge.*caches latents itself"),
        ("cla", "layouts that are known"),
    ],
)
def test_what_one_row_for_all_heads_cannot_have_is_refused(stack: str, says: str) -> None:
    budget = ["budget=0.5"] if stack in ("adakv", "head_budgets", "global_topk", "ghost") else []
    with pytest.raises(KvcompileError, match=says):
        compiled(f"policy=[{stack}]", *budget)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("over", [{"rope_parameters": YARN}, {"v_head_dim": 32}], ids=["yarn", "long values"])
def test_yarn_and_values_longer_than_keys(name: str, over: dict[str, Any]) -> None:
    ids = tiny_ids(1, TOKENS)
    got = next_logits(compiled("policy=[]", name=name, **over), ids)
    torch.testing.assert_close(got, family_model(name, **over)(ids).logits[:, -1:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("over", [{"q_lora_rank": None}, {"rope_interleave": False}, {"attention_bias": True}])
def test_other_shapes_of_the_same_attention(over: dict[str, Any]) -> None:
    ids = tiny_ids(1, TOKENS)
    got, expected = next_logits(compiled("policy=[]", **over), ids), family_model("deepseek_v3", **over)(ids).logits
    torch.testing.assert_close(got, expected[:, -1:], rtol=1e-5, atol=2e-5)


def test_a_weight_that_is_no_plain_layer_is_refused() -> None:
    """Queries are absorbed into what `kv_b_proj` holds: it is read, not called."""
    model: Any = family_model("deepseek_v3")
    layer = model.model.layers[0].self_attn
    layer.kv_b_proj = nn.Sequential(layer.kv_b_proj)
    with pytest.raises(KvcompileError, match=r"kv_b_proj must be a plain nn\.Linear"):
        kvcompile.compile(model, overrides=["policy=[]", "kernels=sdpa"])


def test_a_weight_that_was_replaced_later_is_refused() -> None:
    model, ids = compiled("policy=[]"), tiny_ids(1, 5)
    layer = model.model.layers[0].self_attn
    layer.kv_b_proj = nn.Linear(RANK, 4 * 36, bias=False)
    with pytest.raises(KvcompileError, match=r"kv_b_proj is part of the compiled graph"):
        model(ids)


def test_as_a_program_of_fixed_shape() -> None:
    model = compiled("policy=[snapkv]", "stack.snapkv.window=8", "budget=0.3")
    program, ids = Program(model, Limits(batch=2, prompt=TOKENS, new=4)), tiny_ids(2, TOKENS)
    expected, _ = stepped(model, ids, 4)
    logits, state = program.prefill(ids)
    got = [logits[:, -1]]
    for token in expected[:, :-1].argmax(-1).unbind(1):
        got.append(program.decode(token[:, None], state)[:, -1])
    torch.testing.assert_close(torch.stack(got, 1), expected, atol=2e-4, rtol=1e-4)


def test_a_checkpoint_is_that_of_the_stock_class(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = compiled("policy=[]"), tiny_ids(1, TOKENS)
    kvcompile.export(model, "hf", tmp_path / "hf", tokenizer=tiny_tokenizer())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(stock(ids).logits, family_model("deepseek_v3")(ids).logits)


def test_a_plan_says_that_the_latent_is_the_models_own() -> None:
    """Plans of `mla` read as they did; one head of all query heads, and nothing converted."""
    own = describe(family_config("deepseek_v3"))
    assert own.to_json()["layers"][0]["latent"]["native"] is True
    assert {(p.kv_heads, p.group, p.key_dim, p.value_dim) for p in own.layers} == {(1, 4, RANK + ROPE, RANK)}
    stack = {"mla": {"factor": "weights", "select": "high"}}
    plan = apply_stack(describe(family_config("llama")), build_stack(["mla"], stack))
    assert "native" not in plan.to_json()["layers"][0]["latent"]


def test_a_padded_batch_is_its_sequences_alone() -> None:
    """Also where a selection drops entries."""
    streaming = {"streaming": {"budget": 12, "sinks": 2}}
    config = family_config("deepseek_v3")
    plan = apply_stack(describe(config), build_stack(["streaming"], streaming))
    model, ids = compile_plan(family_model("deepseek_v3"), plan, "sdpa"), tiny_ids(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 4}
    both = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(both[0, -4:], model.generate(ids[:1, 9:], **options)[0, -4:])
    assert torch.equal(both[1, -4:], model.generate(ids[1:], **options)[0, -4:])
