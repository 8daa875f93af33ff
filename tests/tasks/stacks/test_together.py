"""Several recipes in one evaluation: rows as each gives alone, prompts read once, what cannot be is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_tasks import job, measured, place

from kvcompile.analysis.compare.branching import Branching
from kvcompile.config.compose import compose
from kvcompile.errors import KvcompileError
from kvcompile.tasks.run import Measured, trials
from kvcompile.tasks.stacks.together import of_recipes

__all__ = ["place"]


def together(place: Path, folder: Path, *words: str) -> tuple[Measured, Any, Any]:
    config = compose(job(place, *words))
    subject = of_recipes(config)
    measuring = Measured(folder, poll=0.01)
    wanted = trials(subject, config.built_tasks(), config.questions, config.evaluate.part)
    return measuring, measuring.all(wanted), subject


def test_rows_are_those_that_each_recipe_gives_alone(place: Path, tmp_path: Path) -> None:
    recipes = ["snapkv budget=0.25", "zigzag", "adakv_kivi", "gqa", "kvzip"]
    _, side_by_side, _ = together(place, tmp_path / "together", f"evaluate.recipes={recipes}")
    assert len(side_by_side) == 3 * 6
    for recipe in recipes:
        first, *more = recipe.split()
        _, alone = measured(place, tmp_path / "alone", f"recipe={first}", *more)
        stacks = {row.key: row for row in side_by_side}
        for row in alone:
            same = stacks[row.key]
            assert (same.stack, same.command, same.weights) == (row.stack, row.command, row.weights)
            for mine, theirs in zip(same.records, row.records, strict=True):
                assert (mine.sample, mine.turn, mine.size, mine.said) == (
                    theirs.sample,
                    theirs.turn,
                    theirs.size,
                    theirs.said,
                )
                assert mine.nll == (None if theirs.nll is None else pytest.approx(theirs.nll, rel=1e-5))


def test_a_prompt_is_read_once_for_all(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = Branching.extend

    def extend(self: Branching, ids: Any) -> None:
        read.append(len(ids))
        real(self, ids)

    monkeypatch.setattr(Branching, "extend", extend)
    recipes = "evaluate.recipes=[snapkv,streaming,adakv]"
    _, rows, _ = together(place, tmp_path, recipes)
    contexts = {record.sample: record.size.tokens for row in rows for record in row.records if row.question == "hidden"}
    assert sorted(n for n in read if n >= 40) == sorted(contexts.values())


def test_what_was_measured_alone_is_found_again(place: Path, tmp_path: Path) -> None:
    measured(place, tmp_path, "recipe=snapkv")
    measuring, _, _ = together(place, tmp_path, "evaluate.recipes=[snapkv,streaming]")
    assert (measuring.measured, measuring.reused) == (3, 6)


def test_of_all_recipes_those_that_cannot_be_are_said(place: Path) -> None:
    words = [word for word in job(place) if "needle" not in word]
    subject = of_recipes(compose([*words, "evaluate=[perplexity]", "evaluate.recipes=[all]"]))
    names = [stack.name for stack in subject.stacks]
    assert names[0] == "dense"
    assert {"snapkv", "kivi", "gqa", "kvzip", "streaming"} < set(names)
    assert not {"gqa_heal", "block_transformer_heal"} & set(names)
    refused = {note.split(": ")[1] for note in subject.notes}
    assert all(note.startswith("left out: ") and note.count(": ") >= 2 for note in subject.notes)
    assert not refused & set(names)
    for name in refused:
        with pytest.raises(KvcompileError):
            of_recipes(compose([*words, "evaluate=[perplexity]", f"evaluate.recipes=[{name}]"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate.recipes=[snapkv]", "recipe=zigzag"], "with recipe=zigzag"),
        (["evaluate.recipes=[snapkv]", "policy=[kivi]"], r"with policy=\[kivi\]"),
        (["evaluate.recipes=[snapkv]", "prefill_chunk=64"], "with prefill_chunk=64"),
        (["evaluate.recipes=[snapkv]", "evaluate.memory=0"], "evaluate.memory"),
        (["evaluate.recipes=[snapkw]"], "did you mean 'snapkv'"),
        (["evaluate.recipes=['snapkv model.dtype=float16']"], "settings of recipes"),
    ],
)
def test_mistakes_are_refused(place: Path, words: list[str], message: str) -> None:
    with pytest.raises(KvcompileError, match=message):
        of_recipes(compose(job(place, *words)))


def test_the_command_prints_them_side_by_side(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvcompile", *job(place, "evaluate.recipes=[snapkv,streaming]", "question=hidden")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model, needle" in done.stdout
    assert {"dense", "snapkv", "streaming"} <= {line.split()[1] for line in done.stdout.splitlines() if line[:1] == "│"}
    assert "6 rows measured, 0 were there" in done.stdout
