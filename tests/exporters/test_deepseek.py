"""A model with latents as a stock DeepseekV3ForCausalLM: same logits and tokens, in a process without kvcompile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.compiler import assemble
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError
from kvcompile.exporters.deepseek import Deepseek, to_deepseek
from kvcompile.exporters.hf import HF
from kvcompile.exporters.registry import require_open
from kvcompile.stack import apply_stack, build_stack

FREQUENCIES = [[0, 0, 1, 2, 5, 7], [0, 1, 2, 3, 4, 5], [1, 1, 2, 2, 3, 3], []]  # the last layer turns nothing
ROUNDING = 3e-5  # of the logits of random weights, whose attention is sharp: angles and products in float32
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
OPTIONS = {"rope": 12, "rank": 22, "tokens": 64, "frequencies": FREQUENCIES}


def compiled(model: Any, **options: Any) -> Any:
    """Over the reference: in a layer without positions attention is one key each, and rounding decides near ties."""
    config = Config(kernels="reference", stack={"mla": {**OPTIONS, **options}})
    return assemble(model, finish(config), tiny_tokenizer())


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("name", "over"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("mistral", {"sliding_window": None}), ("smollm3", {})],
    ids=str,
)
def test_logits_are_the_same(name: str, over: dict[str, Any]) -> None:
    """Whatever frequencies each layer turns, and however long its latent."""
    model = compiled(tiny_model(name, **over))
    assert [p.latent.rank for p in model.kvcompile.plan.layers] == [22, 22, 22, 34]
    ids = tiny_ids(2, 200)
    stock = to_deepseek(model)
    assert type(stock).__name__ == "DeepseekV3ForCausalLM"
    with torch.no_grad():
        assert off(stock(ids).logits, model(ids).logits) < ROUNDING
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    mine, theirs = (m.generate(ids, attention_mask=mask, **options) for m in (model, stock))
    assert torch.equal(mine, theirs)


def test_another_scale_and_stretched_positions() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    model = compiled(tiny_model("llama", rope_parameters=rope))
    ids = tiny_ids(1, 300)
    with torch.no_grad():
        assert off(to_deepseek(model)(ids).logits, model(ids).logits) < ROUNDING


def test_the_checkpoint_loads_without_kvcompile(tmp_path: Path) -> None:
    model, ids = compiled(tiny_model()), tiny_ids(2, 40)
    model.generation_config.eos_token_id = [2, 5]
    kvcompile.export(model, "deepseek", tmp_path / "stock", tiny_tokenizer())
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.pt")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
seen = torch.load(sys.argv[2])
with torch.no_grad():
    got = model(seen["ids"]).logits
assert "kvcompile" not in sys.modules
print(type(model).__name__, float((got - seen["logits"]).norm() / seen["logits"].norm()) < 3e-5)
print(*model.generation_config.eos_token_id)
"""
    args = [sys.executable, "-c", script, tmp_path / "stock", tmp_path / "expected.pt"]
    told = subprocess.run(args, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert told.stdout.split() == ["DeepseekV3ForCausalLM", "True", "2", "5"]


@pytest.mark.parametrize(
    ("name", "over", "policies", "message"),
    [
        ("llama", {}, ["gqa"], "latent in every layer"),
        ("qwen2", {}, ["mla"], "architecture 'qwen2'"),
        ("llama", {"attention_bias": True}, ["mla"], "biases of queries"),
        ("llama", {"mlp_bias": True}, ["mla"], "biases of the MLP"),
        ("mistral", {}, ["mla"], "a sliding window"),
        ("llama", {"rope_parameters": DYNAMIC}, ["mla"], "RoPE 'dynamic', which depends on the length"),
        ("llama", {}, ["mla", "snapkv"], "'snapkv'. acting on the cache"),
    ],
    ids=str,
)
def test_what_the_class_cannot_hold_is_refused(
    name: str, over: dict[str, Any], policies: list[str], message: str
) -> None:
    config = tiny_config(name, **over)
    plan = apply_stack(describe(config), build_stack(policies, {}))
    with pytest.raises(KvcompileError, match=message):
        require_open([Deepseek()], plan, config)


def test_the_other_exporters_send_latents_here() -> None:
    config = tiny_config("llama")
    plan = apply_stack(describe(config), build_stack(["mla"], {}))
    with pytest.raises(KvcompileError, match=r"no stock class of 'llama' caches a latent.*export=\[deepseek\]"):
        require_open([HF()], plan, config)
