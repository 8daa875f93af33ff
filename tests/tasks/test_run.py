"""`kvcompile evaluate=[...]` on a tiny model: rows are measured once, found again, and told in a table."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer
from tiny_tasks import WORDS, job, measured, place

import kvcompile
from kvcompile.config.compose import compose
from kvcompile.config.recipe import from_recipe, to_recipe
from kvcompile.errors import KvcompileError
from kvcompile.progress import silent
from kvcompile.tasks import rows
from kvcompile.tasks.ask import Respondent
from kvcompile.tasks.claims import Claims
from kvcompile.tasks.run import Measured, trials
from kvcompile.tasks.stacks.subject import of_config

__all__ = ["place"]


def test_the_command_prints_protocol_and_scores_and_leaves_rows(place: Path, tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        command = [sys.executable, "-m", "kvcompile", *job(place, *words)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    done = run("recipe=snapkv")
    assert done.returncode == 0, done.stderr
    assert "snapkv on model, float32" in done.stdout
    assert "hidden: the cache is made of the context alone" in done.stdout
    assert "6 rows measured, 0 were there" in done.stdout
    folder = tmp_path / "outputs" / "rows"
    assert len(list(folder.iterdir())) == 6, "no claim and no part is left"
    row = json.loads(next(iter(folder.iterdir())).read_text())
    assert str(place) not in json.dumps(row), "where a file lay is nobody's business"
    assert "6 were there" in run("recipe=snapkv").stdout


def test_a_job_that_finds_its_rows_loads_no_weights(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, before = measured(place, tmp_path, "recipe=snapkv")
    monkeypatch.setattr("kvcompile.models.loading.load", None)
    second, after = measured(place, tmp_path, "recipe=snapkv")
    assert (first.measured, first.reused, second.measured, second.reused) == (6, 0, 0, 6)
    assert after == before


def test_stacks_share_the_row_of_the_uncompressed_model(place: Path, tmp_path: Path) -> None:
    measured(place, tmp_path, "recipe=snapkv")
    other, found = measured(place, tmp_path, "recipe=streaming")
    assert (other.measured, other.reused) == (3, 3)
    assert [row.stack for row in found] == ["dense"] * 3 + ["streaming"] * 3
    dense, _ = measured(place, tmp_path)
    assert (dense.measured, dense.reused) == (0, 3)
    alone, _ = measured(place, tmp_path, "recipe=random", "evaluate.baseline=false")
    assert (alone.measured, alone.reused) == (3, 0)


def test_a_killed_job_goes_on_inside_its_row(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = Respondent.ask, []

    def ask(self: Respondent, task: Any, sample: Any, question: Any) -> Any:
        asked.append((task.name, sample.name, question))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(self, task, sample, question)

    monkeypatch.setattr(Respondent, "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        measured(place, tmp_path)
    assert not list(tmp_path.glob("*.row.json"))
    _, found = measured(place, tmp_path)
    assert len(asked) == 1 + sum(len({r.sample for r in row.records}) for row in found), "the first is not asked again"
    assert sorted(p.suffixes[-2:] for p in tmp_path.iterdir()) == [[".row", ".json"]] * 3


def test_a_row_that_another_process_measures_is_waited_for_and_not_measured_twice(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose([word for word in job(place, "evaluate=[perplexity]") if "needle" not in word])
    (trial,) = trials(of_config(config), config.built_tasks(), config.questions)
    other = Measured(tmp_path, poll=0.01)
    waits: list[float] = []
    row = trial.measure(lambda unit, compute: compute(), silent)

    def look_away(seconds: float) -> None:  # instead of sleeping: the other process comes to its end
        waits.append(seconds)
        if len(waits) == 3:
            rows.write(tmp_path, row)
            claim.__exit__(None, None, None)

    claim = Claims(tmp_path).claim(trial.key)
    assert claim.__enter__()
    monkeypatch.setattr("kvcompile.tasks.run.time.sleep", look_away)
    monkeypatch.setattr(Respondent, "ask", None)
    assert other.all([trial]) == [row]
    assert (len(waits), other.measured, other.reused) == (3, 0, 1)


def test_the_summary_of_a_sweep_shows_scores(place: Path, tmp_path: Path) -> None:
    words = [word for word in job(place, "recipe=snapkv,streaming") if "needle" not in word]
    command = [sys.executable, "-m", "kvcompile", "-m", "evaluate=[perplexity]", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with next(tmp_path.glob("multirun/*/*/summary.csv")).open() as file:
        jobs = list(csv.DictReader(file))
    assert [each["recipe"] for each in jobs] == ["snapkv", "streaming"]
    assert len({each["perplexity_dense"] for each in jobs}) == 1
    assert all(float(each["perplexity"]) > 1 and 0 < float(each["kept"]) < 1 for each in jobs)
    assert len(list((tmp_path / "outputs" / "rows").glob("*.row.json"))) == 3


def test_shards_are_rows_of_their_own_and_pool_to_one_cell(place: Path, tmp_path: Path) -> None:
    _, whole = measured(place, tmp_path)
    for shard in ("0/2", "1/2"):
        part, _ = measured(place, tmp_path, f"evaluate.shard={shard}")
        assert part.measured == 3
    pooled = [cell for cell in rows.cells(rows.found([tmp_path])) if len(cell.rows) == 2]
    assert all(cell.complete for cell in pooled)
    for row in whole:
        (cell,) = (c for c in pooled if (c.first.task, c.first.question) == (row.task, row.question))
        assert sorted(cell.records, key=lambda r: r.sample) == sorted(row.records, key=lambda r: r.sample)
    with pytest.raises(KvcompileError, match="every shard must have a sample, got 2 in 3 shards"):
        measured(place, tmp_path, "evaluate.shard=0/3")


def test_other_weights_texts_and_options_are_other_rows(place: Path, tmp_path: Path) -> None:
    measured(place, tmp_path)
    model = tiny_model()
    model.lm_head.weight.data.mul_(2)
    (tmp_path / "other").mkdir()
    model.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    assert measured(place, tmp_path, f"model.pretrained={tmp_path / 'other'}")[0].measured == 3
    assert measured(place, tmp_path, "tasks.needle.seed=1")[0].measured == 2
    text = tmp_path / "words.txt"  # the same name with other words
    text.write_text(WORDS.replace("w5", "w12"))
    assert measured(place, tmp_path, f"tasks.needle.haystacks=['{text}']")[0].measured == 2


def test_the_command_of_a_row_measures_it_again(place: Path, tmp_path: Path) -> None:
    _, found = measured(place, tmp_path, "recipe=snapkv", "budget=0.1", "question=hidden")
    by_task = {row.task: row for row in found if row.stack != "dense"}
    assert set(by_task) == {"needle", "perplexity"}
    row = by_task["perplexity"]
    assert row.stack == "snapkv budget=0.1"
    words = shlex.split(row.command)[1:]
    assert words[:3] == ["evaluate=[perplexity]", "recipe=snapkv", "budget=0.1"]
    config = compose(words)
    assert config.stack == compose(["recipe=snapkv", "budget=0.1"]).stack
    assert config.tasks["perplexity"]["texts"] == ["words.txt"]


def test_a_config_with_tasks_is_a_recipe_like_any(place: Path) -> None:
    config = compose(job(place, "recipe=snapkv", "question=seen", "evaluate.shard=1/2"))
    assert from_recipe(to_recipe(config)) == config
    assert config.output is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate=[needl]"], "unknown task, got 'needl'. Fix: did you mean 'needle'?"),
        (["evaluate=[needle,needle]"], "each task may be in evaluate once"),
        (["evaluate=[needle]", "tasks.needle.sample=1"], "did you mean 'samples'?"),
        (["tasks.needle.samples=3"], "options of a task need it in evaluate=[...], got tasks.needle"),
        (["evaluate=[needle]", "tasks.needle.samples=0"], "tasks.needle: samples must be 1 or more, got 0."),
        (["evaluate=[needle]", "analysis=[lmba]"], "an evaluation asks tasks and writes rows"),
        (["evaluate=[needle]", "recipe=gqa", "export=[hf]"], "an evaluation asks tasks and writes rows"),
        (["evaluate=[needle]", "plan=only"], "an evaluation asks tasks and writes rows"),
        (["evaluate=[needle]", "output=x"], "an evaluation asks tasks and writes rows"),
        (["evaluate=[needle]", "question=all"], "unknown question, got 'all'. Fix: one of seen, hidden, both"),
        (["evaluate=[needle]", "evaluate.shard=2/2"], "evaluate.shard must be k/n with 0 <= k < n, got 2/2"),
        (["evaluate=[needle]", "evaluate.shard=-1/2"], "evaluate.shard must be k/n"),
        (["evaluate=[needle]", "artifact=x", "recipe=snapkv"], "an artifact is compiled already"),
        (["artifact=x"], "needs export=[...] or evaluate=[...]"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(overrides: list[str], message: str) -> None:
    with pytest.raises(KvcompileError) as error:
        compose(overrides)
    assert message in str(error.value)


def test_an_artifact_is_asked_as_the_stack_that_it_was_saved_from(place: Path, tmp_path: Path) -> None:
    model = f"model.pretrained={place / 'model'}"
    words = ["recipe=snapkv_kivi", "kernels=sdpa", "tasks.needle.samples=1", "question=hidden"]
    _, before = measured(place, tmp_path, *words)
    from kvcompile.job import compile_config

    quiet = ["needle.enabled=false", "perplexity.enabled=false", "speed.enabled=false"]
    done = compile_config(compose(["recipe=snapkv_kivi", model, "kernels=sdpa", f"output={tmp_path / 'out'}", *quiet]))
    config = compose([w for w in job(place, "tasks.needle.samples=1", "question=hidden") if "pretrained" not in w])
    config.artifact = done.path
    measuring = Measured(tmp_path)
    found = measuring.all(trials(of_config(config), config.built_tasks(), config.questions))
    assert (measuring.measured, measuring.reused) == (2, 2), "the uncompressed model of its recipe is known"
    assert [row.records for row in found] == [row.records for row in before]
    assert found[-1].stack == before[-1].stack == "snapkv_kivi"
    assert found[-1].command.startswith("kvcompile evaluate=[perplexity] artifact=out ")


def test_python_asks_compiled_and_plain_models(place: Path, tmp_path: Path) -> None:
    options = {"tokens": 40, "scored": 6, "windows": 2, "texts": [str(place / "words.txt")]}
    model = tiny_model()
    (dense,) = kvcompile.evaluate(model, {"perplexity": options}, tiny_tokenizer())
    assert dense.stack == "dense"
    assert not hasattr(model, "kvcompile"), "it is left as it is"
    compiled = kvcompile.compile(model, "streaming", "kernels=sdpa")
    (row,) = kvcompile.evaluate(compiled, {"perplexity": options}, tiny_tokenizer(), rows=tmp_path)
    assert (row.stack, row.policies) == ("streaming", {"streaming": row.policies["streaming"]})
    assert row.records[0].nll != dense.records[0].nll
    assert kvcompile.evaluate(compiled, {"perplexity": options}, tiny_tokenizer(), rows=tmp_path) == [row]
    with pytest.raises(KvcompileError, match="unknown question"):
        kvcompile.evaluate(model, ["needle"], tiny_tokenizer(), question="al")
    (tmp_path / "file").touch()
    with pytest.raises(KvcompileError, match="rows need a folder that can be written to"):
        kvcompile.evaluate(compiled, {"perplexity": options}, tiny_tokenizer(), rows=tmp_path / "file")
