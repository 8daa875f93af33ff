"""Models with weights in few bits: their products, their artifacts, their report, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_model
from tiny import tiny_ids, tiny_model
from torch import nn

import kvcompile
from kvcompile.config.compose import compose
from kvcompile.errors import KvcompileError
from kvcompile.job import warnings
from kvcompile.kernels.cpp import build
from kvcompile.kernels.names import WEIGHTS
from kvcompile.kernels.reference.packed import PackedLinear
from kvcompile.report.report import Report
from kvcompile.structure.pack import pack_weights, packed_as, weight_bytes, weight_count
from kvcompile.tasks.stacks.subject import Checkpoint

SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
SELECTED = ["policy=[streaming]", "stack.streaming.budget=15"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def near(got: torch.Tensor, expected: torch.Tensor, most: float) -> None:
    assert float((got.float() - expected.float()).norm() / expected.float().norm()) < most


@pytest.mark.parametrize("format", WEIGHTS)
def test_the_compiled_model_computes_what_its_rounded_weights_do(format: str) -> None:
    """A prompt to the bit as transformers' own modules with these weights, a decode step up to 8 bits for its rows."""
    model = tiny_model("llama", **SIZES)
    rounded = copy.deepcopy(model)
    pack_weights(rounded, format)
    plain = copy.deepcopy(model)
    for (name, packed), linear in zip(_packed(rounded), _linears(plain), strict=True):
        assert packed.weight.shape == linear.weight.shape, name
        linear.weight.copy_(packed.weight)
    compiled = kvcompile.compile(model, overrides=[f"model.weights={format}"])
    assert packed_as(compiled) == format
    ids = tiny_ids(2, 40)
    assert torch.equal(compiled(ids).logits, kvcompile.compile(copy.deepcopy(plain))(ids).logits)
    near(compiled(ids).logits, plain(ids).logits, 1e-4)
    cache, own = compiled(ids).past_key_values, plain(ids, use_cache=True).past_key_values
    step = tiny_ids(2, 1, seed=3)
    near(compiled(step, past_key_values=cache).logits, plain(step, past_key_values=own).logits, 0.15)


def _packed(model: nn.Module) -> list[tuple[str, PackedLinear]]:
    return [(name, module) for name, module in model.named_modules() if type(module) is PackedLinear]


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear]


@pytest.mark.skipif(build.available() is not None, reason=f"no compiler: {build.available()}")
def test_a_decode_step_runs_fused_and_reads_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As through the modules, which read the same codes one layer at a time; a weight that moves is seen."""
    original = tiny_model("qwen2", hidden_size=128, intermediate_size=256)
    model = kvcompile.compile(original, overrides=["model.weights=int4"])
    assert "8 fused kernels a token" in model.kvcompile.decode_step()
    cache = model(tiny_ids(3, 20)).past_key_values
    step = tiny_ids(3, 1, seed=5)
    fused = model(step, past_key_values=cache.fork()).logits
    steps, model.kvcompile.steps = model.kvcompile.steps, None
    near(fused, model(step, past_key_values=cache.fork()).logits, 0.02)
    model.kvcompile.steps = steps
    up = model.model.layers[2].mlp.up_proj
    up.codes = torch.full_like(up.codes, 0x88)
    assert not torch.equal(model(step, past_key_values=cache.fork()).logits, fused)


@pytest.mark.parametrize("format", WEIGHTS)
@pytest.mark.parametrize("tied", [False, True])
def test_an_artifact_holds_the_codes(format: str, tied: bool, tmp_path: Path) -> None:
    original = tiny_model("llama", **SIZES, tie_word_embeddings=tied)
    plain = weight_bytes(original), weight_count(original)
    model = kvcompile.compile(original, overrides=[*SELECTED, f"model.weights={format}"])
    folder = kvcompile.save(model, tmp_path / "a")
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert weight_bytes(model) <= stored < weight_bytes(model) + 20_000
    assert weight_bytes(model) < (0.4 if format == "int8" else 0.3) * plain[0]
    assert weight_count(model) == plain[1]
    loaded, ids = kvcompile.load(folder), tiny_ids(2, 40)
    assert packed_as(loaded) == format
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    again = [m.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None) for m in (loaded, model)]
    assert torch.equal(*again)
    half = kvcompile.load(folder, dtype="bfloat16")
    assert half.lm_head.weight.dtype == torch.bfloat16
    near(half(ids).logits, model(ids).logits, 0.2)


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe", "falcon", "gpt_neox", "phi3"])
def test_other_families(name: str) -> None:
    """Rounded weights inside every kind of layer: the step after a prompt is near that of the model as it was."""
    original = family_model(name)
    model = kvcompile.compile(copy.deepcopy(original), overrides=["model.weights=int8"])
    plain = kvcompile.compile(original)
    ids, step = tiny_ids(2, 24), tiny_ids(2, 1, seed=3)
    near(model(ids).logits, plain(ids).logits, 0.3)
    rounded, exact = model(ids).past_key_values, plain(ids).past_key_values
    near(model(step, past_key_values=rounded).logits, plain(step, past_key_values=exact).logits, 0.3)


def test_gates_stay_floats() -> None:
    original: Any = tiny_model("llama", **SIZES)
    original.model.layers[0].mlp.gate = nn.Linear(128, 8)
    pack_weights(original, "int8")
    assert type(original.model.layers[0].mlp.gate) is nn.Linear
    assert type(original.model.layers[0].mlp.up_proj) is PackedLinear
    assert type(original.lm_head) is PackedLinear


@pytest.mark.skipif(build.available() is not None, reason=f"no compiler: {build.available()}")
def test_where_no_kernel_reads_them_a_report_says_so_and_other_devices_are_refused(tmp_path: Path) -> None:
    model = kvcompile.compile(tiny_model("llama", **SIZES), overrides=["model.weights=int8", "kernels=sdpa"])
    report = Report(title="", model="", recipe="", policies=[], tokens=64, rows=[], weights="int8")
    report = replace(report, passes=model.kvcompile.changes)
    assert any("floats are made of them at every token" in line for line in warnings(model, report))
    fast = kvcompile.compile(tiny_model("llama", **SIZES), overrides=["model.weights=int8", "kernels=cpp"])
    assert not warnings(fast, replace(report, passes=fast.kvcompile.changes))
    folder = kvcompile.save(fast, tmp_path / "a")
    with pytest.raises(KvcompileError, match="kernels of a CPU"):
        kvcompile.load(folder, device="meta")
    with pytest.raises(KvcompileError, match="kernels of a CPU"):
        pack_weights(tiny_model("llama", **SIZES).to("meta"), "int8")


def test_what_is_refused() -> None:
    with pytest.raises(KvcompileError, match=r"unknown model.weights, got .int3.*Known: int8, int4"):
        compose(["model.weights=int3"])
    with pytest.raises(KvcompileError, match="run in kvcompile alone"):
        compose(["model.weights=int8", "policy=[streaming]", "export=[hf]"])
    with pytest.raises(KvcompileError, match="compared on the model as it is"):
        compose(["model.weights=int8", "evaluate=[needle]", "evaluate.recipes=[snapkv]"])
    narrow = tiny_model("llama", hidden_size=48, head_dim=12)
    with pytest.raises(KvcompileError, match="multiples of 32"):
        kvcompile.compile(narrow, overrides=["model.weights=int8"])
    assert _linears(narrow)
    assert not _packed(narrow)
    with pytest.raises(KvcompileError, match="latents"):
        kvcompile.compile(family_model("deepseek_v3"), overrides=["model.weights=int8"])
    twice = tiny_model("llama", **SIZES)
    pack_weights(twice, "int8")
    with pytest.raises(KvcompileError, match="plain linear layers"):
        pack_weights(twice, "int4")


def test_rows_of_an_evaluation_are_of_these_weights_alone() -> None:
    """What was measured with floats is not taken for what is measured with few bits, nor int8 for int4."""
    kinds = ("null", *WEIGHTS)
    configs = [compose(["policy=[streaming]", "evaluate=[needle]", f"model.weights={kind}"]) for kind in kinds]
    settings = [Checkpoint(config.model).stack(config).settings for config in configs]
    assert len({str(each) for each in settings}) == len(kinds)
