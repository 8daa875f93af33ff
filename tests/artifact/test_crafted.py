"""Crafted artifacts, their manifests made to fit: refused in one short line, soon, and nothing outside is read."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forged import signed
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.errors import KvcompileError

WEIGHTS = "model.kvcompile.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = kvcompile.compile(tiny_model(), overrides=["policy=[kivi]", "kernels=sdpa"])
    return kvcompile.save(model, tmp_path_factory.mktemp("made") / "artifact", tiny_tokenizer())


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "artifact"))


def config(**values: Any) -> Callable[[Path], None]:
    """`config.json` with other values."""

    def change(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, **values}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """The weights, changed in place."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def recipe(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / "recipe.yaml").read_text()
        assert old in text
        (folder / "recipe.yaml").write_text(text.replace(old, new))

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def _poisoned(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


def _whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)


def _mixed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)


def _elsewhere(folder: Path) -> None:
    """Weights moved out of the folder, and an index that leads there."""
    (folder / WEIGHTS).rename(folder.parent / "x.safetensors")
    places = dict.fromkeys(load_file(folder.parent / "x.safetensors"), "../x.safetensors")
    for name in ("model.safetensors.index.json", "model.safetensors.index.kvcompile.json"):
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    save_file({}, folder / "decoy.safetensors")


def _adapter(folder: Path) -> None:
    """transformers would load the model that this file names, with an adapter."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"}')
    (folder / WEIGHTS).write_bytes(b"")


def aliases(levels: int) -> str:
    """A list of 10^levels entries in a few lines."""
    rows = ["x0: &x0 [1,1,1,1,1,1,1,1,1,1]"]
    rows += [f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(rows) + "\n"


NO_SKIP = "skip_layers: []"
CRAFTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "index that leads out": (_elsewhere, "weights of its config"),
    "adapter of another model": (_adapter, "weights of its config"),
    "no heads": (config(num_attention_heads=0), "config.json"),
    "no KV heads": (config(num_key_value_heads=0), "ZeroDivisionError"),
    "no head size": (config(head_dim=0), "ZeroDivisionError"),
    "negative head size": (config(head_dim=-16), "config.json"),
    "heads in words": (config(num_attention_heads="two"), "config.json"),
    "broken head size": (config(head_dim=80.5), "config.json"),
    "huge vocabulary": (config(vocab_size=10**12), "numbers, got"),
    "huge layers": (config(hidden_size=2**40), "weights of its config"),
    "overflowing layers": (config(intermediate_size=2**62), "weights of its config"),
    "many layers": (config(num_hidden_layers=10**9), "num_hidden_layers must be in 1 to"),
    "no theta": (config(rope_parameters={"rope_type": "default", "rope_theta": 0}), "finite"),
    "theta is NaN": (config(rope_parameters={"rope_type": "default", "rope_theta": float("nan")}), "finite"),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "plain weights"),
    "other type": (config(model_type="llama"), "model_type"),
    "long type": (config(model_type="x" * 100_000), "model_type"),
    "no stamp": (config(kvcompile=None), "config.json must describe"),
    "not a config": (write("config.json", "[1]"), "config.json must describe"),
    "NaN weights": (weights(_poisoned), "model.norm.weight: NaN"),
    "integer weights": (weights(_whole_numbers), "must have one floating dtype"),
    "mixed weights": (weights(_mixed), "must have one floating dtype"),
    "no weights": (weights(dict.clear), "must have one floating dtype"),
    "aliases": (recipe("stack:", aliases(6) + "stack:"), "alias"),
    "many aliases": (recipe("stack:", aliases(60) + "stack:"), "alias"),
    "long list": (recipe(NO_SKIP, f"skip_layers: {list(range(10**5))}"), "at most 20,000 values"),
    "long text": (write("recipe.yaml", b"a: " + b"b" * (17 << 20)), "more than the"),
    "deep text": (write("plan.json", "[" * 100_000), "plan.json must be a plan"),
    "broken index of kernels": (write("kernels/kernels.json", json.dumps({"backend": "x" * 10_000})), "kernels.json"),
    "deep generation config": (write("generation_config.json", "[1]"), "generation_config.json"),
}


def refused_soon(folder: Path, words: str) -> None:
    started = time.process_time()
    with pytest.raises(KvcompileError, match=words) as caught:
        kvcompile.load(folder)
    assert time.process_time() - started < 30
    told = str(caught.value)
    assert "\n" not in told
    assert len(told.replace(str(folder), "")) <= 300


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_artifact_is_refused_in_one_short_line(kind: str, folder: Path) -> None:
    craft, words = CRAFTED[kind]
    craft(folder)
    signed(folder)
    refused_soon(folder, words)


def facts(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        data = json.loads((folder / "manifest.json").read_text())
        change(data)
        (folder / "manifest.json").write_text(json.dumps(data))

    return rewrite


MANIFESTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "endless bytes": (facts(lambda m: m["files"]["plan.json"].update(bytes=float("inf"))), "must be a manifest"),
    "long name": (facts(lambda m: m["files"].update({"x" * 5_000: m["files"]["plan.json"]})), "is no name of a file"),
    "two lines": (facts(lambda m: m["files"].update({"a\nb": m["files"]["plan.json"]})), "is no name of a file"),
    "format 0": (facts(lambda m: m.update(format=0)), "compile again"),
    "format true": (facts(lambda m: m.update(format=True)), "format number"),
    "no versions": (facts(lambda m: m.update(versions=None)), "must be a manifest"),
    "unlisted merges": (write("merges.txt", "a b"), r"does not list, got merges\.txt\. Fix: .*kvcompile\.save"),
    "unlisted vocabulary": (write("vocab.txt", "a"), r"does not list, got vocab\.txt"),
    "unlisted tokenizer": (write("tokenizer.model", b"a"), r"does not list, got tokenizer\.model"),
    "unlisted script": (write("run", "x"), "does not list, got run"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_crafted_manifest_is_refused_in_one_short_line(kind: str, folder: Path) -> None:
    craft, words = MANIFESTS[kind]
    craft(folder)
    refused_soon(folder, words)


def test_what_an_index_names_is_not_read(folder: Path) -> None:
    """Weights come from the files that the manifest lists, whatever lies beside them."""
    places = {"model.norm.weight": "w.bin", "lm_head.weight": "/etc/x.safetensors"}
    for name in ("model.safetensors.index.json", "model.safetensors.index.kvcompile.json"):
        (folder / name).write_text(json.dumps({"weight_map": places}))
    (folder / "w.bin").write_bytes(pickle.dumps(print))
    signed(folder)
    assert kvcompile.load(folder)


def test_no_code_is_read_with_a_checkpoint() -> None:
    """Every call of an Auto class says so: without it transformers asks on the terminal, and a yes runs code."""
    import ast

    import kvcompile.models.loading as package

    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and called.startswith("Auto") and called.endswith(".from_pretrained"):
                given = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None]
                assert {"options", "file", "DATA_ONLY"} & {*given}, f"{path}: line {node.lineno}"
