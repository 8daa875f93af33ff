"""What is refused before any work: a place that holds something else, a tokenizer of another model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.artifact.manifest import MANIFEST, RECIPE
from kvcompile.config.compose import compose
from kvcompile.config.recipe import to_recipe
from kvcompile.errors import KvcompileError
from kvcompile.job import target


def test_an_artifact_of_other_policies_is_not_replaced(tmp_path: Path) -> None:
    """`recipe=mqa` today and `recipe=mqa policy=[gqa]` tomorrow must not end in one folder without a word."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / MANIFEST).touch()
    (folder / RECIPE).write_text(to_recipe(compose(["policy=[snapkv,kivi]"])))
    same = compose(["policy=[snapkv,kivi]", "stack.snapkv.budget=0.1", f"output={folder}"])
    assert target(same) == folder
    for other in ("[kivi]", "[snapkv]", "[]"):
        with pytest.raises(KvcompileError, match=r"holds policy=\[snapkv,kivi\]. Fix: output=<another folder>"):
            target(compose([f"policy={other}", f"output={folder}"]))
    (folder / RECIPE).write_text("broken: [")
    assert target(same) == folder


def test_one_override_needs_no_list() -> None:
    model = kvcompile.compile(tiny_model(), "snapkv", "budget=0.5")
    assert model.kvcompile.plan.layers[0].selection.budget.value == 0.5


def test_a_tokenizer_of_another_vocabulary_is_refused() -> None:
    """Else a token out of range ends as an IndexError in the embeddings, or as an assertion on a GPU."""
    with pytest.raises(KvcompileError, match=r"tokenizer must be the model's own, got a token of number 127 .* 100"):
        kvcompile.compile(tiny_model(vocab_size=100), "snapkv", tokenizer=tiny_tokenizer())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"])
    kvcompile.compile(tiny_model(), "snapkv", tokenizer=tokenizer)
