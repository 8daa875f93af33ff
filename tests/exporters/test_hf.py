"""Exporter hf: what it writes is a model of transformers alone, with the logits of the compiled model."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, tiny_config, tiny_ids, tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.errors import KvcompileError
from kvcompile.exporters.hf import HF
from kvcompile.stack import apply_stack, build_stack


@torch.no_grad()
def stepped(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A prefill, five cached steps, greedy text."""
    step, cache, logits = ids[:, :40], None, []
    for cut in (40, *range(41, 46)):
        out = model(step, past_key_values=cache, use_cache=True)
        cache, step = out.past_key_values, ids[:, cut : cut + 1]
        logits.append(out.logits)
    text = model.generate(ids[:1, :40], max_new_tokens=6, do_sample=False, eos_token_id=None)
    return {"logits": torch.cat(logits, 1), "text": text}


# the same in a process of its own, with plain transformers
IMPORTS = """
import json, sys
from pathlib import Path
from typing import Any
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
"""
FACTS = """
facts = {}
for folder in map(Path, sys.argv[1:]):
    eager = {"attn_implementation": "eager"} if "gemma" in folder.name else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **eager)
    torch.save(stepped(model, torch.load(folder.parent / "ids.pt")), folder.parent / f"{folder.name}.pt")
    facts[folder.name] = {
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "kv_heads": getattr(model.config, "num_key_value_heads", None),
        "eos": model.generation_config.eos_token_id,
        # of some families transformers insists on their own class of tokenizer, which our toy is not
        "words": AutoTokenizer.from_pretrained(folder)("w7 w9")["input_ids"] if "llama" in folder.name else [7, 9],
        "parameters": sum(p.numel() for p in model.parameters()),
    }
assert "kvcompile" not in sys.modules
print(json.dumps(facts))
"""


def elsewhere(*folders: Path) -> dict[str, Any]:
    torch.save(tiny_ids(2, 46), folders[0].parent / "ids.pt")
    code = IMPORTS + inspect.getsource(stepped) + FACTS
    command = [sys.executable, "-c", code, *map(str, folders)]
    done = subprocess.run(command, cwd=folders[0].parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def here(model: Any) -> dict[str, torch.Tensor]:
    return stepped(model, tiny_ids(2, 46))


def compiled(name: str, stack: str, **over: Any) -> Any:
    model = tiny_model(name, **over)
    model.generation_config.eos_token_id = [2, 5]
    return kvcompile.compile(model, overrides=[stack, "kernels=sdpa"], tokenizer=tiny_tokenizer())


STACKS = {
    "dense": "policy=[]",
    "gqa": "policy=[gqa]",
    "rotated": "policy=[mqa,rotate]",
    "centred": "policy=[center]",
}

# the kind that changes most weights: a rotation needs a layer that sees everything, gpt_neox has no KV heads to merge
KINDS = {
    **dict.fromkeys(ARCHITECTURES, ("rotated",)),
    **dict.fromkeys(("mistral", "mixtral", "phi3"), ("gqa",)),
    "gpt_neox": ("dense",),
    "llama": tuple(STACKS),
}


def test_every_family_runs_without_us(tmp_path: Path) -> None:
    made = {}
    for name in ARCHITECTURES:
        for kind in KINDS[name]:
            over = {} if name == "gpt_neox" else {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
            made[f"{name}-{kind}"] = model = compiled(name, STACKS[kind], **over)
            kvcompile.export(model, "hf", tmp_path / f"{name}-{kind}", tiny_tokenizer())
    facts = elsewhere(*(tmp_path / name for name in made))
    for name, model in made.items():
        there, ours = torch.load(tmp_path / f"{name}.pt"), here(model)
        torch.testing.assert_close(there["logits"], ours["logits"], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: n + m)
        assert torch.equal(there["text"], ours["text"]), name
        said = facts[name]
        assert said["class"] == type(model).__name__
        assert said["words"] == [7, 9]
        assert said["eos"] == [2, 5]
        assert said["parameters"] == sum(p.numel() for p in model.parameters())
        if "gpt_neox" not in name:
            assert said["kv_heads"] == model.kvcompile.plan.layers[0].kv_heads
            assert said["kv_heads"] == {"gqa": 2, "rotated": 1}.get(name.rpartition("-")[2], 4)


def test_dtype_and_ties_are_kept(tmp_path: Path) -> None:
    half = tiny_model(tie_word_embeddings=True).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "checkpoint")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.bfloat16)
    model = kvcompile.compile(model, overrides=["policy=[mqa]"])
    done = kvcompile.export(model, "hf", tmp_path / "half", tiny_tokenizer())
    facts = elsewhere(tmp_path / "half")["half"]
    assert (facts["dtype"], facts["tied"]) == ("torch.bfloat16", True)
    assert done.files["model.safetensors"] < 2 * sum(p.numel() for p in model.parameters()) + 10_000
    assert done.bytes == sum(p.stat().st_size for p in (tmp_path / "half").iterdir())


def test_what_was_calibrated_travels_in_the_weights(tmp_path: Path) -> None:
    over = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    model = kvcompile.compile(
        tiny_model(**over),
        overrides=["policy=[gqa]", "stack.gqa.merge=similarity", "stack.gqa.align=both", "stack.gqa.tokens=64"],
        tokenizer=tiny_tokenizer(),
    )
    kvcompile.export(model, "hf", tmp_path / "aligned", tiny_tokenizer())
    elsewhere(tmp_path / "aligned")
    there = torch.load(tmp_path / "aligned.pt")
    torch.testing.assert_close(there["logits"], here(model)["logits"], atol=2e-5, rtol=1e-4)


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = compiled("llama", "policy=[gqa]")
    config, before = model.config, here(model)
    kvcompile.export(model, "hf", tmp_path / "a")
    assert model.config is config
    assert torch.equal(here(model)["logits"], before["logits"])


REFUSED = [
    ("llama", ["snapkv"], r"holds weights.*got 'snapkv' in layer 0. Fix: export.hf.weights_only=true"),
    ("llama", ["gqa", "zigzag", "kivi"], r"got 'zigzag' in layer 0"),
    ("llama", ["int8"], r"got 'int8' in layer 0"),
    ("llama", ["quest"], r"acts on the cache while the model runs, got 'quest' in layer 2"),
    ("llama", ["gqa", "quest", "paged"], r"got 'paged' in layer 0"),
    ("llama", ["offload"], r"got 'offload' in layer 0"),
    ("llama", ["rotate", "paged"], r"got 'paged' in layer 0"),
    ("llama", ["cla"], r"no stock class of .* lets layers of 'llama' read .*gemma3n and gemma4.*got layer 1 reading"),
    ("qwen2", ["mlkv"], r"no stock class .* of 'qwen2'"),
    ("gpt_neox", ["gqa"], r"'gpt_neox' has as many KV heads as query heads, got 2 and 4"),
]


@pytest.mark.parametrize(("name", "stack", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_a_checkpoint_cannot_hold_is_refused(name: str, stack: list[str], message: str) -> None:
    config = tiny_config(name)
    plan = apply_stack(describe(config), build_stack(stack, {}))
    with pytest.raises(KvcompileError, match=message):
        HF().refuse(plan, config)


def test_weights_only_leaves_the_cache_policies_behind(tmp_path: Path) -> None:
    model = kvcompile.compile(tiny_model(), overrides=["policy=[mqa,snapkv,rotate,kivi]", "budget=0.3"])
    with pytest.raises(KvcompileError, match="weights_only"):
        kvcompile.export(model, "hf", tmp_path / "a", tiny_tokenizer())
    kvcompile.export(model, "hf", tmp_path / "a", tiny_tokenizer(), weights_only=True)
    elsewhere(tmp_path / "a")
    ours = here(kvcompile.compile(tiny_model(), overrides=["policy=[mqa]"]))
    torch.testing.assert_close(torch.load(tmp_path / "a.pt")["logits"], ours["logits"], atol=2e-5, rtol=1e-4)
