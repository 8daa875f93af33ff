"""Damaged and forged artifacts: one line that names the file and the fix, and nothing in a folder is executed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forged import refused, signed
from tiny import tiny_ids, tiny_model

import kvcompile
from kvcompile.artifact import artifact
from kvcompile.artifact import weights as artifact_weights
from kvcompile.errors import KvcompileError


@pytest.fixture(scope="module")
def model() -> Any:
    return kvcompile.compile(tiny_model(), overrides=["policy=[snapkv]", "stack.snapkv.budget=0.4"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    return artifact.save(model, tmp_path_factory.mktemp("made") / "artifact")


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    """An artifact that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "artifact"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


# damage


def _truncate(folder: Path) -> None:
    weights = folder / "model.kvcompile.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _flip(folder: Path) -> None:
    data = bytearray((folder / "model.kvcompile.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.kvcompile.safetensors").write_bytes(data)


def _set(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "manifest.json", lambda m: {**m, key: value})


def _listing(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "manifest.json", lambda m: {**m, "files": change(m["files"])})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, r"artifact: no such folder\. Fix: "),
    "missing file": (lambda f: (f / "recipe.yaml").unlink(), r"recipe\.yaml: missing\. Fix: compile again"),
    "missing weights": (
        lambda f: (f / "model.kvcompile.safetensors").unlink(),
        r"model\.kvcompile\.safetensors: missing\. Fix: compile again",
    ),
    "truncated": (
        _truncate,
        r"model\.kvcompile\.safetensors must have \d+ bytes, got \d+: truncated or altered\. Fix: compile again",
    ),
    "altered": (_flip, r"model\.kvcompile\.safetensors must be as it was saved, got other content"),
    "altered text": (lambda f: (f / "graph.txt").write_text("x"), r"graph\.txt must have"),
    "no manifest": (
        lambda f: (f / "manifest.json").unlink(),
        r"weights of a compiled model without it, as export=\[hf\]",
    ),
    "empty manifest": (
        lambda f: (f / "manifest.json").write_text(""),
        r"manifest\.json must be JSON.*Fix: compile again",
    ),
    "half manifest": (lambda f: (f / "manifest.json").write_text('{"format": 1'), r"manifest\.json must be JSON"),
    "binary manifest": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), r"manifest\.json must be JSON"),
    "list": (
        lambda f: (f / "manifest.json").write_text("[]"),
        r"format number, got .*manifest\.json without\. Fix: give",
    ),
    "no format": (_set("format", None), r"format number"),
    "newer": (_set("format", 99), r"of format 2, got format 99, made by kvcompile \d.*Fix: upgrade kvcompile"),
    "older": (_set("format", 1), r"of format 2, got format 1, made by kvcompile \d.*Fix: compile again"),
    "format true": (_set("format", True), r"format number"),
    "no files": (_set("files", None), r"manifest\.json must be a manifest of format 2.*Fix: compile again"),
    "no digest": (_set("plan", "?"), r"digest is no SHA-256"),
    "unlisted recipe": (
        _listing(lambda m: {k: v for k, v in m.items() if k != "recipe.yaml"}),
        r"recipe.yaml is not listed",
    ),
    "unlisted weights": (_listing(lambda m: {k: v for k, v in m.items() if ".safetensors" not in k}), r"no weights"),
    "path out": (_listing(lambda m: {**m, "../x": m["recipe.yaml"]}), r"leads out of the folder"),
    "no facts": (_listing(lambda m: {**m, "recipe.yaml": {}}), r"manifest\.json must be a manifest"),
    "stranger": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b"x"),
        r"does not list, got .*pytorch_model\.bin\. Fix: move",
    ),
    "code": (lambda f: (f / "modeling_llama.py").write_text("x"), r"does not list, got .*modeling_llama\.py"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_that_names_file_and_fix(kind: str, folder: Path) -> None:
    damage, words = DAMAGE[kind]
    damage(folder)
    refused(folder, words)


def test_a_readme_beside_the_model_does_no_harm(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    assert kvcompile.load(folder)


def test_a_file_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(KvcompileError, match="x: a file"):
        kvcompile.load(tmp_path / "x")


def test_folders_of_transformers_are_told_apart(model: Any, made: Path, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(KvcompileError, match=r"never compiled\. Fix: kvcompile recipe=<name> model\.pretrained="):
        kvcompile.load(tmp_path / "plain")
    artifact_weights.write_checkpoint(model, tmp_path / "weights")
    with pytest.raises(KvcompileError, match=r"as export=\[hf\] writes them\. Fix: AutoModelForCausalLM"):
        kvcompile.load(tmp_path / "weights")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KvcompileError, match=r"empty: none\. Fix: give the folder"):
        kvcompile.load(tmp_path / "empty")


# a manifest can be forged: what lies behind it must be refused or ignored, and never run

TRAP = "raise SystemExit('code of an artifact was executed')"


def _recipe(folder: Path, old: str, new: str) -> None:
    text = (folder / "recipe.yaml").read_text()
    assert old in text
    (folder / "recipe.yaml").write_text(text.replace(old, new))


def _original(folder: Path, key: str, value: Any) -> None:
    def change(config: Any) -> Any:
        config["kvcompile"]["original"][key] = value
        return config

    edit(folder / "config.json", change)


FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another budget": (
        lambda f: _recipe(f, "budget: 0.4", "budget: 0.9"),
        r"plan\.json: the recipe must give the plan .*layers differs.*saved by kvcompile .* read by kvcompile",
    ),
    "another plan": (lambda f: edit(f / "plan.json", lambda p: {**p, "prefill_chunk": 7}), r"prefill_chunk differs"),
    "no plan": (lambda f: (f / "plan.json").write_text("[1]"), r"plan\.json must be a plan"),
    "unknown policy": (lambda f: _recipe(f, "snapkv:", "snipkv:"), r"recipe\.yaml must be a recipe: unknown policy"),
    "no yaml": (lambda f: (f / "recipe.yaml").write_text("{"), r"recipe\.yaml must be a recipe: a recipe must be YAML"),
    "target": (lambda f: _recipe(f, "stack:\n", "stack:\n  _target_: os.abort\n"), r"recipe\.yaml must be a recipe"),
    "inner target": (
        lambda f: _recipe(f, "    sinks:", "    _target_: os.abort\n    sinks:"),
        r"unknown field of stack",
    ),
    "top target": (lambda f: _recipe(f, "stack:", "_target_: os.abort\nstack:"), r"recipe\.yaml must be a recipe"),
    "yaml tag": (lambda f: _recipe(f, "stack:", "x: !!python/object/apply:os.abort []\nstack:"), r"must be YAML"),
    "interpolation": (lambda f: _recipe(f, "name: llama", "name: ${oc.env:HOME}"), r"plain values"),
    "broken weights": (
        lambda f: (f / "model.kvcompile.safetensors").write_bytes(b"x" * 99),
        r"must hold the weights of its config",
    ),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config\.json must describe a known model"),
    "foreign model": (
        lambda f: _original(f, "model_type", "rwkv"),
        r"config\.json must describe a known model: rwkv is not compiled: it has no attention",
    ),
    "more layers": (lambda f: edit(f / "config.json", lambda c: {**c, "num_hidden_layers": 5}), r"\d numbers, got"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_artifact_is_refused_in_one_line(kind: str, folder: Path) -> None:
    forge, words = FORGED[kind]
    forge(folder)
    signed(folder)
    refused(folder, words)


class Bomb:
    def __reduce__(self) -> Any:
        return exec, (TRAP,)


def test_nothing_in_an_artifact_is_executed(folder: Path, model: Any) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    code = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
    edit(folder / "config.json", lambda c: {**c, "auto_map": code, "attn_implementation": "someone/kernel"})
    for name in ("trap.py", "graph.py", "custom_generate/generate.py", "kernels/trap.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TRAP)
    (folder / "graph.txt").write_text(TRAP)
    signed(folder)
    ids = tiny_ids(1, 60)
    assert torch.equal(kvcompile.load(folder)(ids).logits, model(ids).logits)


def test_weights_are_never_unpickled(folder: Path) -> None:
    (folder / "model.kvcompile.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (folder / "decoy.safetensors").write_bytes(b"")
    signed(folder)
    with pytest.raises(KvcompileError, match="must hold the weights of its config"):
        kvcompile.load(folder)
