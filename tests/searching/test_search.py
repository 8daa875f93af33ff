"""Protects a search from end to end on a tiny model: its files, its proof, going on after a kill, and two at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_ids, tiny_model, tiny_tokenizer
from tiny_search import SPACE, words

import kvcompile
from kvcompile.config.compose import compose
from kvcompile.errors import KvcompileError
from kvcompile.models.sharing import shared
from kvcompile.searching import command
from kvcompile.searching.command import main, search, settings
from kvcompile.searching.run import tasks_of
from kvcompile.searching.study import Study

__all__ = ["words"]
TESTS = Path(__file__).parents[1]
QUICK = ["search.tokens=64", "search.rungs=[1,2,4]", "search.bytes=1/3", "search.perplexity=null", "kernels=sdpa"]


@pytest.fixture
def own(tmp_path: Path, words: None) -> Path:
    """A folder with the tiny space in it."""
    (tmp_path / "own" / "search").mkdir(parents=True)
    (tmp_path / "own" / "search" / "tiny.yaml").write_text(SPACE)
    return tmp_path / "own"


def run(own: Path, output: Path, *overrides: str, model: Any = None) -> Any:
    found = [f"hydra.searchpath=['file://{own}']", *QUICK, "search.space=tiny", f"output={output}", *overrides]
    config, _ = settings(found[1:], str(own))
    space = settings(found[1:], str(own))[1]
    from kvcompile.searching.run import search_model
    from kvcompile.searching.write import write

    result = search_model(model or tiny_model(), tiny_tokenizer(), config, space)
    write(result, config)
    return result


def test_a_wish_becomes_a_recipe_a_report_and_a_proof(own: Path, tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = run(own, tmp_path / "out", "search.stacks=4", model=model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert result.best is result.front[0]
    assert result.best.share <= 1 / 3
    assert result.proof.records
    assert not {r.sample for r in result.proof.records} & {"words 4", "words 5"}  # the unseen task has four
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"report.md", "search.json", "front.png", "front.svg", "front.html", "recipe", "study.journal"} <= written
    report = (tmp_path / "out" / "report.md").read_text()
    assert "# Search: at most 1/3.0 of the bfloat16 bytes" in report
    assert "## Verified on what the search never saw" in report
    assert "The wish is" in report
    assert f"`{' '.join(result.overrides)}`" in report
    data = json.loads((tmp_path / "out" / "search.json").read_text())
    assert data["best"]["stack"] == result.overrides
    assert len(data["tried"]) == len(result.every)

    folder = tmp_path / "out"
    config = compose([f"hydra.searchpath=['file://{folder}']", "recipe=found"])
    assert config.policies() == result.stack.policies()
    compiled = kvcompile.compile(shared(model), overrides=[*result.overrides, "kernels=sdpa"])
    cache = compiled(tiny_ids(1, 64)).past_key_values
    assert sum(map(sum, cache.lengths())) < 4 * 2 * 64 / 2


def test_the_same_search_goes_on_and_zero_minutes_show_what_is_known(own: Path, tmp_path: Path) -> None:
    model = tiny_model()
    first = run(own, tmp_path / "out", "search.stacks=2", model=model)
    assert len(first.every) == 2
    lines = (tmp_path / "out" / "measured.jsonl").read_text()
    shown = run(own, tmp_path / "out", "search.minutes=0", model=model)
    assert (tmp_path / "out" / "measured.jsonl").read_text() == lines
    assert shown.best.stack == first.best.stack
    assert len(shown.proofs) == len(first.proofs)
    more = run(own, tmp_path / "out", "search.stacks=1", model=model)
    assert len(more.every) == 3
    with pytest.raises(KvcompileError, match=r"holds stacks of another search: search.tokens was 64 there"):
        run(own, tmp_path / "out", "search.tokens=65", "search.stacks=1", model=model)


WORKER = """
import sys
sys.path[:0] = [{tests!r}, {searching!r}]
from kvcompile.tasks import registry
from tiny_search import Words
known = {{**registry.discover(), "words": Words}}
registry.discover = lambda: known
import os, signal, test_search
from pathlib import Path
from kvcompile.analysis.parts import Parts
append, lines = Parts._append, []
def write_and_die(self, line):
    append(self, line)
    lines.append(line)
    if len(lines) == {dies}:
        os.kill(os.getpid(), signal.SIGKILL)
Parts._append = write_and_die
test_search.run(Path({own!r}), Path({output!r}), *sys.argv[1:])
"""


def worker(own: Path, output: Path, *overrides: str, dies: int = 0) -> subprocess.Popen[bytes]:
    """Another process with the same search. dies: killed as soon as it has written so many measurements, if any."""
    folders = {"tests": str(TESTS), "searching": str(TESTS / "searching"), "own": str(own), "output": str(output)}
    code = WORKER.format(**folders, dies=dies)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *overrides], env=environment, cwd=output.parent)


def keys(output: Path) -> list[str]:
    path = output / "measured.jsonl"
    return [json.loads(line)["key"] for line in path.read_text().splitlines()] if path.exists() else []


def stacks(output: Path, states: set[str]) -> list[str]:
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(output / "study.journal"))
    study = optuna.load_study(storage=optuna.storages.JournalStorage(backend), study_name="search")
    trials = [t for t in study.trials if t.state.name in states and "stack" in t.user_attrs]
    return [json.dumps(t.user_attrs["stack"]) for t in trials]


def test_a_search_that_was_killed_goes_on_and_measures_nothing_twice(own: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = worker(own, output, "search.stacks=50", dies=8)
    assert process.wait(timeout=500) == -signal.SIGKILL
    before = keys(output)
    assert len(before) == 8
    begun = stacks(output, {"RUNNING"})
    assert begun
    run(own, output, "search.stacks=3")
    assert max(Counter(keys(output)).values()) == 1
    assert keys(output)[: len(before)] == before
    assert not stacks(output, {"RUNNING"})
    assert set(begun) <= set(stacks(output, {"COMPLETE"}))


def test_two_processes_join_one_study_and_lose_and_repeat_nothing(own: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    workers = [worker(own, output, "search.stacks=4") for _ in range(2)]
    assert [process.wait(timeout=500) for process in workers] == [0, 0]
    complete = stacks(output, {"COMPLETE"})
    assert max(Counter(complete).values()) == 1
    assert not stacks(output, {"RUNNING"})
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(output / "study.journal"))
    study = optuna.load_study(storage=optuna.storages.JournalStorage(backend), study_name="search")
    by = Counter(t.user_attrs["worker"] for t in study.trials if t.state.name == "COMPLETE")
    assert len(by) == 2
    assert all("scores" in t.user_attrs for t in study.trials if t.state.name == "COMPLETE")


def test_the_command_refuses_what_is_no_search_and_python_needs_a_tokenizer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--help"])
    assert "search.bytes=1/24" in capsys.readouterr().out
    for arguments, says in (
        (["recipe=snapkv"], "finds the stack itself"),
        (["model.weights=int8"], "got model.weights"),
        (["-m", "search.bytes=1/3"], "takes one flag, --config-dir, got -m"),
        (["--config-dir"], "must name a folder"),
        (["--config-dir", "nowhere"], "must name a folder that is there"),
        (["search.bytes=2"], "search.bytes must be a share"),
        (["search.rungs=[4,2]"], "each more than the one before"),
        (["search.space=defualt"], "did you mean 'default'"),
        (["search.minuts=3"], "did you mean 'minutes'"),
    ):
        with pytest.raises(KvcompileError) as error:
            main(arguments)
        assert says in str(error.value)
    with pytest.raises(KvcompileError, match="needs a tokenizer"):
        search(tiny_model(), bytes=1 / 3)
    assert settings(["search.bytes=1/24"])[0].output == "outputs/search-llama"
    assert not list(tmp_path.iterdir())


def test_without_optuna_its_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(KvcompileError, match=r"pip install 'kvcompile\[search\]'"):
        Study("a", None, tmp_path, 1, {}, 0)


def test_python_takes_wishes_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def stop(overrides: list[str], folder: str | None = None) -> Any:
        seen["config"] = settings(overrides)[0]
        raise KvcompileError("enough")

    monkeypatch.setattr(command, "settings", stop)
    with pytest.raises(KvcompileError, match="enough"):
        kvcompile.search(tiny_model(), tiny_tokenizer(), bytes=1 / 24, minutes=5, rungs=[2, 4], storage=None)
    wanted = seen["config"].search
    assert (wanted.bytes, wanted.minutes, wanted.rungs) == (str(1 / 24), 5, [2, 4])


def test_samples_are_as_long_as_the_search_says(words: None) -> None:
    options = yaml.safe_load("{words: {samples: 2}, needle: {samples: 1}, perplexity: {tokens: 77}}")
    assert [task.tokens for task in tasks_of(options, 200)] == [200, (200,), 77]
