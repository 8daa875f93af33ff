"""`kvcompile analysis=[...]`: JSON, picture and report of a tiny model; a second run measures what is missing."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

from kvcompile.analysis import registry
from kvcompile.analysis.run import analyse, command
from kvcompile.config.compose import compose
from kvcompile.config.recipe import from_recipe, to_recipe
from kvcompile.errors import KvcompileError
from kvcompile.progress import silent

WORDS = " ".join(f"w{4 + (7 * i * i + i) % 120}" for i in range(400))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return path


def run(text: Path, *overrides: str, model: Any = None) -> list[str]:
    words = ["analysis=[lmba]", f"output={text.parent / 'out'}", f"prompts.source={text}", "prompts.tokens=60"]
    said: list[str] = []
    analyse(model or tiny_model(), tiny_tokenizer(), compose([*words, *overrides]), silent, said.append)
    return said


def test_the_command_writes_json_picture_and_report(text: Path) -> None:
    folder = text.parent / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    command = ["-m", "kvcompile", "analysis=[lmba]", "model=llama", f"model.pretrained={folder}", "prompts.tokens=60"]
    done = subprocess.run(
        [sys.executable, *command, f"prompts.source={text}"],
        cwd=text.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "lmba: 2 parts measured" in done.stdout
    out = text.parent / "outputs" / "analysis-llama"
    finding = json.loads((out / "lmba.json").read_text())
    assert [p["tokens"] for p in finding["result"]["prompts"]] == [60, 60]
    assert len(finding["result"]["layers"]) == 4
    assert len((out / "lmba.json").read_text().splitlines()) < 120, "a line for each list of numbers"
    assert (out / "lmba.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.md").read_text()
    assert "## lmba" in report
    assert "prompts.source=words.txt" in report
    assert str(text.parent) not in report + json.dumps(finding), "where a file lay is nobody's business"


def test_a_second_run_goes_on_where_the_first_ended(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lmba = registry.discover()["lmba"]
    real: Callable[..., Any] = lmba._of  # type: ignore[attr-defined]
    calls: list[int] = []

    def stops_at_the_second(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(lmba, "_of", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(text)
    assert run(text) == ["lmba: 1 parts measured, 1 taken from an earlier run"]
    before = (text.parent / "out" / "lmba.json").read_text()
    assert run(text) == ["lmba: 0 parts measured, 2 taken from an earlier run"]
    assert (text.parent / "out" / "lmba.json").read_text() == before
    assert len(calls) == 3


def test_other_settings_and_other_weights_are_measured_anew(text: Path) -> None:
    run(text)
    assert run(text, "analysis.lmba.mass=0.5") == ["lmba: 2 parts measured, 2 of other settings left aside"]
    other = tiny_model()
    other.lm_head.weight.data.mul_(2)
    assert run(text, model=other) == ["lmba: 2 parts measured, 4 of other settings left aside"]


def test_a_torn_line_is_measured_again(text: Path) -> None:
    run(text)
    record = text.parent / "out" / "record" / "lmba.jsonl"
    record.write_text(record.read_text()[:-40])
    assert run(text) == ["lmba: 1 parts measured, 1 taken from an earlier run"]
    assert run(text) == ["lmba: 0 parts measured, 2 taken from an earlier run"]


def test_the_command_in_the_report_gives_the_settings_again(text: Path) -> None:
    words = ["analysis=[lmba]", "model=llama", "prompts.count=3", "analysis.lmba.per=each"]
    assert shlex.split(command(compose(words)))[1:] == words
    config = compose(
        ["analysis=[lmba]", "model=qwen2", 'prompts.template="Read {context}:\n{input}?"', "prompts.chat=true"]
    )
    assert compose(shlex.split(command(config))[1:]) == config
    assert from_recipe(to_recipe(config)) == config


def test_the_command_tells_no_path() -> None:
    for path in ("/home/me/x.gguf", "~/x.gguf", "../x.gguf"):
        words = command(compose(["analysis=[lmba]", f"model.pretrained='{path}'", f"prompts.source='{path}'"]))
        assert words == "kvcompile analysis=[lmba] model=llama model.pretrained=x.gguf prompts.source=x.gguf"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["analysis=[lmbaa]"], "unknown analysis, got 'lmbaa'. Fix: did you mean 'lmba'?"),
        (["analysis=[lmba,lmba]"], "each analysis may be in analysis once"),
        (["analysis=[lmba]", "analysis.lmba.mas=1"], "did you mean 'mass'?"),
        (["analysis.lmba.mass=0.5"], "options of an analysis need it in analysis=[...]"),
        (["analysis=[lmba]", "analysis.lmba.mass=1"], "analysis.lmba: mass must be in (0, 1), got 1.0."),
        (["analysis=[lmba]", "analysis.lmba.per=all"], "analysis.lmba: per must be one of mean, each"),
        (["analysis=[lmba]", "recipe=snapkv"], "an analysis is of the original model"),
        (["analysis=[lmba]", "plan=only"], "an analysis is of the original model"),
        (["analysis=[lmba]", "prompts.count=0"], "prompts.count must be 1 or more"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(overrides: list[str], message: str) -> None:
    with pytest.raises(KvcompileError) as error:
        compose(overrides)
    assert message in str(error.value)


def test_nothing_else_is_overwritten(text: Path) -> None:
    (text.parent / "out").mkdir()
    (text.parent / "out" / "thesis.md").write_text("mine")
    with pytest.raises(KvcompileError, match="beside nothing else"):
        run(text)
