"""Keys less their mean: exact by itself, saved with the model, refused where a softmax would see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contract_table import compiled, dense, off, plan_of
from test_contract import steps
from tiny import tiny_ids, tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.analysis.compare.contest import Contest
from kvcompile.analysis.compare.entry import Entry
from kvcompile.artifact import artifact
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.models.sharing import shared

TOKENS = 60


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "olmo2", "gpt_neox", "smollm3", "gemma3_text"])
@pytest.mark.parametrize("more", [{}, {"rotate": {}}], ids=["alone", "rotated"])
def test_it_is_exact_by_itself(architecture: str, more: dict[str, Any]) -> None:
    """Prefill and decode, a batch with padding, layers under windows (which stay) and without rotation."""
    ids, mask = tiny_ids(3, TOKENS), torch.ones(3, TOKENS, dtype=torch.int64)
    mask[1, :13] = 0
    model = compiled({"center": {"tokens": 64}, **more}, architecture)
    with torch.no_grad():
        expected, got = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (dense(architecture), model))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    decoded, plain = (steps(m, ids, TOKENS - 4)[0] for m in (model, compiled({}, architecture)))
    torch.testing.assert_close(decoded, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [{}, {"gqa": {"kv_heads": 1}}, {"cla": {}}], ids=["own", "gqa", "cla"])
def test_what_is_stored_is_less_the_mean_key_of_the_text(shape: dict[str, Any]) -> None:
    """Of the converted model's heads; readers of another layer's cache have none of their own."""
    model, plain = compiled({**shape, "center": {"tokens": 64}}), compiled(shape)
    text = tiny_tokenizer()(" ".join(["word"] * 64), return_tensors="pt")["input_ids"]
    ids = tiny_ids(1, TOKENS)
    with torch.no_grad():
        of_text, of_ids, got = (m(x).past_key_values for m, x in ((plain, text), (plain, ids), (model, ids)))
    for p, mean, keys, centred in zip(
        plain.kvcompile.plan.layers, of_text.layers, of_ids.layers, got.layers, strict=True
    ):
        assert hasattr(model.model.layers[p.index].self_attn, "center") == (p.owner == p.index)
        if p.owner == p.index:
            for a, b, c in zip(mean.held.rows(), keys.held.rows(), centred.held.rows(), strict=True):
                torch.testing.assert_close(c[0], b[0] - a[0][4:].mean(0), atol=1e-5, rtol=1e-4)


def test_few_bits_hold_more_of_keys_that_point_one_way() -> None:
    """What it is for: projections with a large bias, which a token's own scale is spent on."""
    torch.manual_seed(0)
    model = tiny_model("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[[7, 15, 23, 31]] += 20.0  # slow channels: they hardly turn
    ids = tiny_ids(2, TOKENS + 20)
    with torch.no_grad():
        expected = model(ids).logits[:, TOKENS:]
    stored = {"rotate": {}, "kivi": {"key_axis": "token", "group": 16, "residual": 0}}
    errors = []
    for stack in (stored, {"center": {}, **stored}):
        own = compile_plan(shared(model), plan_of(stack, "qwen2"), tokenizer=tiny_tokenizer())
        errors.append(off(steps(own, ids, TOKENS)[0][:, TOKENS:], expected))
    assert errors[1] < 0.5 * errors[0]


def test_attention_chooses_the_same_entries() -> None:
    ids = tiny_ids(2, TOKENS)
    for score in ({"snapkv": {"budget": 16, "window": 8}}, {"h2o": {"budget": 16}}, {"tova": {"budget": 16}}):
        with torch.no_grad():
            plain, got = (compiled(stack, "qwen2")(ids).past_key_values for stack in (score, {**score, "center": {}}))
        assert [x[2].tolist() for x in got.layers[1].held.rows()] == [
            x[2].tolist() for x in plain.layers[1].held.rows()
        ]


def test_the_means_are_saved_and_loaded(tmp_path: Path) -> None:
    overrides = ["policy=[snapkv,center,rotate,kivi]", "budget=0.5", "stack.snapkv.window=8", "stack.center.tokens=64"]
    model = kvcompile.compile(tiny_model("qwen2"), overrides=overrides, tokenizer=tiny_tokenizer())
    loaded = kvcompile.load(artifact.save(model, tmp_path / "a", tiny_tokenizer()))
    ids = tiny_ids(2, TOKENS + 4)
    for one, other in zip(steps(model, ids, TOKENS)[:1], steps(loaded, ids, TOKENS)[:1], strict=True):
        assert torch.equal(one, other)


def test_stacks_that_share_a_prefill_are_centred_alike() -> None:
    class Words:
        eos_token_id = None

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tiny_tokenizer()(*args, **kwargs)

    contest, ids = Contest(dense("qwen2"), Words(), kernels="sdpa"), tiny_ids(1, TOKENS)[0].tolist()
    stack = ["policy=[snapkv,center,rotate,kivi]", "budget=20", "stack.snapkv.window=8"]
    runner = contest.runner(Entry(" ".join(stack)))
    assert runner.reader is not None
    cache = runner.cache(ids)
    own = kvcompile.compile(shared(dense("qwen2")), overrides=[*stack, "kernels=sdpa"], tokenizer=tiny_tokenizer())
    with torch.no_grad():
        alone = own(torch.tensor([ids])).past_key_values
    for one, other in zip(cache.layers, alone.layers, strict=True):
        for a, b in zip(one.held.rows(), other.held.rows(), strict=True):
            assert a[2].tolist() == b[2].tolist()
            torch.testing.assert_close(a[0], b[0], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("stack", "architecture", "why"),
    [
        ({"center": {}}, "gemma2", "soft-cap"),
        ({"center": {}}, "gpt_oss", "sink"),
        ({"mla": {"factor": "weights", "select": "uniform"}, "center": {}}, "llama", "a latent row keeps"),
        ({"knorm": {"budget": 16}, "center": {}}, "llama", "measures keys themselves"),
        ({"keydiff": {"budget": 16}, "center": {}}, "llama", "measures keys themselves"),
        ({"streaming": {"positions": "compact"}, "center": {}}, "llama", "compact positions"),
        ({"block_transformer": {}, "center": {}}, "llama", "attends to tokens"),
        ({"center": {"tokens": 3}}, "llama", "16 or more"),
    ],
)
def test_it_is_refused(stack: dict[str, Any], architecture: str, why: str) -> None:
    with pytest.raises(KvcompileError, match=why):
        plan_of(stack, architecture)


def test_it_wants_a_tokenizer() -> None:
    with pytest.raises(KvcompileError, match="needs a tokenizer"):
        kvcompile.compile(tiny_model(), overrides=["policy=[center]"])
