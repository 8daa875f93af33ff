"""The `kvcompile` command as a user meets it: a process, its output, its exit code. The compiler itself is faked."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAKE = """
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from kvcompile.errors import KvcompileError

def compile_config(config):
    budget = config.stack.get("snapkv", {}).get("budget")
    if budget == 0.25:
        raise KvcompileError("a quarter is refused", budget, "another budget")
    if budget == 0.75:
        raise RuntimeError("a bug")
    Path(config.output).mkdir(parents=True)
    return SimpleNamespace(path=config.output, summary={"needle": 0.5, "budget": budget})

sys.modules["kvcompile.job"] = job = ModuleType("kvcompile.job")  # the real one imports torch
job.compile_config = compile_config
sys.argv[0] = "kvcompile"
from kvcompile.cli import main
main()
"""


LAUNCHER = """
from dataclasses import dataclass
from hydra.core.config_store import ConfigStore
from hydra._internal.core_plugins.basic_launcher import BasicLauncher

class Other(BasicLauncher):
    def launch(self, *args, **kwargs):
        print("launched by another package")
        return super().launch(*args, **kwargs)

@dataclass
class Options:
    _target_: str = "hydra_plugins.hydra_other_launcher.other.Other"

ConfigStore.instance().store(group="hydra/launcher", name="other", node=Options, provider="other")
"""


def kvcompile(where: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FAKE, *arguments]
    env = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    return subprocess.run(command, cwd=where, capture_output=True, text=True, check=False, env=env)


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
    told = {line.split()[0]: "do not compare" in line for line in lines if "selection:" in line}
    assert told["knorm"], "its scores have another unit in every layer"
    assert not any(told[name] for name in ("ghost", "snapkv", "global_topk"))
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
        (["-m", "recipe=snapkv", "budget=interval(0.1,0.5)"], "Fix: list the values (a,b,c)"),
        (["--config-dir", "nonesuch", "recipe=x"], "--config-dir must name a folder that is there, got nonesuch."),
        (["--config-name", "nonesuch"], "there is one main config, got --config-name nonesuch"),
        (["--config-path", "/nonesuch"], "Fix: --config-dir <folder>"),
        (["--cfg", "job", "recipe=snpkv"], "did you mean 'snapkv'?"),
        (["--cfg", "jobs"], "invalid choice: 'jobs'"),
        (["--info", "defaults", "recipe=snpkv"], "did you mean 'snapkv'?"),
        (["--budget", "3"], "settings are written name=value"),
        (["-m", "--cfg", "job"], "only one of --multirun, --cfg"),
        (["recipe=snapkv", "-m", "budget=0.1,0.5"], "flags come first"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [override /policy: [snapkv]]", "Fix: a recipe begins with the line '# @package _global_'"),
        ("# @package _global_\ndefaults: [override /policy: [snpkv]]", "unknown policy, got 'snpkv'"),
        (
            "# @package _global_\ndefaults: [override /policy: [snapkv]]\nstack: {snapkv: {bugdet: 1}}",
            "got 'stack.snapkv.bugdet'. Fix: did you mean 'budget'",
        ),
        ("a: [", "a config file must be YAML, got "),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--cfg", "job"]], ids=str)
def test_mistakes_in_own_recipes_are_one_line(tmp_path: Path, text: str, message: str, flags: list[str]) -> None:
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    (tmp_path / "mine" / "recipe" / "x.yaml").write_text(f"{text}\n")
    done = kvcompile(tmp_path, *flags, "--config-dir", "mine", "recipe=x")
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_launchers_of_other_packages_run_sweeps(tmp_path: Path) -> None:
    package = tmp_path / "plugins" / "hydra_plugins" / "hydra_other_launcher"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "other.py").write_text(LAUNCHER)
    (tmp_path / "run").mkdir()
    done = kvcompile(tmp_path / "run", "-m", "recipe=glob(kn*)", "hydra/launcher=other", path=tmp_path / "plugins")
    assert done.returncode == 0, done.stderr
    assert "launched by another package" in done.stdout


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
