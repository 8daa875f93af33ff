"""The `kvcompile` command as a user meets it: a process, its output, its exit code. The compiler itself is faked."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

FAKE = """
import sys
from pathlib import Path
import kvcompile.compiler as compiler
from kvcompile.errors import KvcompileError

def compile_config(config):
    budget = config.stack.get("snapkv", {}).get("budget")
    if budget == 0.25:
        raise KvcompileError("a quarter is refused", budget, "another budget")
    if budget == 0.75:
        raise RuntimeError("a bug")
    Path(config.output).mkdir(parents=True)
    return compiler.Outcome(config.output, {"needle": 0.5, "budget": budget})

compiler.compile_config = compile_config
sys.argv[0] = "kvcompile"
from kvcompile.cli import main
main()
"""


def kvcompile(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FAKE, *arguments]
    return subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)


def test_version_is_ours(tmp_path: Path) -> None:
    from importlib.metadata import version

    done = kvcompile(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"kvcompile {version('kvcompile')}\n")


def test_ls_has_one_line_each(tmp_path: Path) -> None:
    done = kvcompile(tmp_path, "ls")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert {"recipes", "policies", "models"} <= set(lines)
    for name in ("zigzag", "snapkv", "llama"):
        assert [line for line in lines if line.split()[:1] == [name] and len(line.split()) > 2], name
    assert kvcompile(tmp_path, "ls", "models").stdout.startswith("models\n")
    assert kvcompile(tmp_path, "ls", "modles").returncode == 1


def test_help_shows_groups_and_examples(tmp_path: Path) -> None:
    text = kvcompile(tmp_path, "--help").stdout
    for group in ("model: ", "policy: ", "recipe: ", "sweep: "):
        assert f"\n{group}" in text
    assert "kvcompile recipe=zigzag model=llama" in text
    assert "prefill_chunk: 0" in text


def test_a_run_leaves_nothing_but_the_artifact(tmp_path: Path) -> None:
    done = kvcompile(tmp_path, "recipe=snapkv", "model=llama")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["outputs"]
    assert [p.name for p in (tmp_path / "outputs").iterdir()] == ["snapkv-llama"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=snpkv"], "did you mean 'snapkv'?"),
        (["recipe=snapkv", "budget=7.5"], "stack.snapkv: budget must be in (0, 1]"),
        (["recipe=snapkv", "stack.snapkv.windw=3"], "did you mean 'window'?"),
        (["policy=[snapkv,snapkv]"], "each policy may be in the stack once"),
        (["recipe=snapkv", "budget=0.25"], "a quarter is refused, got 0.25. Fix: another budget."),
        (["-m", "recipe=snapkv,snpkv"], "did you mean 'snapkv'?"),
    ],
)
def test_mistakes_are_one_line_on_stderr(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = kvcompile(tmp_path, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == [], "a refused command starts nothing"


def test_a_sweep_keeps_the_good_jobs_and_reports_the_bad(tmp_path: Path) -> None:
    done = kvcompile(tmp_path, "-m", "recipe=snapkv", "model=llama", "budget=0.5,0.25,0.75,0.1")
    assert done.returncode == 1
    assert done.stderr.endswith("2 of 4 jobs failed\n")
    assert "job 1: a quarter is refused" in done.stdout
    (folder,) = (tmp_path / "multirun").glob("*/*")
    with (folder / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "ok"]
    assert rows[2]["error"] == "RuntimeError: a bug"
    assert all((tmp_path / row["output"]).is_dir() for row in rows if row["status"] == "ok")
    assert json.loads((folder / "3" / "result.json").read_text())["summary"]["budget"] == 0.1
    assert (folder / "summary.md").exists()


def test_jobs_of_a_sweep_never_share_an_output_folder(tmp_path: Path) -> None:
    done = kvcompile(tmp_path, "-m", "policy=[snapkv],[]", "output=here")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["0", "1"]


def test_a_sweep_preset_needs_no_flag(tmp_path: Path) -> None:
    done = kvcompile(tmp_path, "recipe=snapkv", "sweep=budget", "hydra.sweeper.params.budget='0.5,0.1'")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("multirun/*/*/*/result.json"))) == 2


def test_own_recipes_by_config_dir(tmp_path: Path) -> None:
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    (tmp_path / "mine" / "recipe" / "x.yaml").write_text(
        "# @package _global_\ndefaults: [override /policy: [snapkv]]\nstack: {snapkv: {budget: 0.125}}\n"
    )
    done = kvcompile(tmp_path, "--config-dir", "mine", "recipe=x")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "x-llama").is_dir()


def test_plan_only_prints_and_writes_nothing(tmp_path: Path) -> None:
    done = kvcompile(tmp_path, "plan=only", "recipe=snapkv", "model=llama", "plan.batch=4", "plan.memory=8")
    assert done.returncode == 0, done.stderr
    assert "0-29" in done.stdout
    assert "8 GiB hold prompts of" in done.stdout
    assert list(tmp_path.iterdir()) == []
