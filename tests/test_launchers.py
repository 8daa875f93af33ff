"""Sweeps in several processes, by Hydra's launchers: each job is told from the others and done once, whatever dies."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from tiny import tiny_model, tiny_tokenizer

from kvcompile.config.compose import check
from kvcompile.errors import KvcompileError
from kvcompile.tasks import rows

PLUGINS = {
    "kv_joblib": "joblib",
    "kv_ray": "ray",
    "kv_ray_cluster": "ray",
    "kv_slurm": "slurm",
    "kv_slurm_local": "slurm",
}
MODULES = {"joblib": "joblib", "ray": "ray", "slurm": "submitit"}
QUICK = ["kernels=sdpa", "needle.enabled=false", "perplexity.enabled=false", "speed.enabled=false"]


def needs(launcher: str) -> None:
    """Skip where the plugin of a launcher is not installed."""
    extra = PLUGINS[launcher]
    if importlib.util.find_spec(MODULES[extra]) is None:
        pytest.skip(f"needs kvcompile[{extra}]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer on disk, and a text for it."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    sentences = (f"W{4 + i % 120} w{4 + i // 120} w{4 + i * i % 120} w7 w8 w9 w10 w11." for i in range(400))
    (folder / "words.txt").write_text(" ".join(sentences))
    return folder


def command(model: Path, launcher: str, *words: str) -> list[str]:
    place = [f"model.pretrained={model}", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep"]
    return [sys.executable, "-m", "kvcompile", "-m", *place, *words]


def environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # what presets set
    return {**own, "RAY_raylet_start_wait_time_s": "300"}  # of a busy machine


def run(where: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=where, env=environment(), capture_output=True, text=True, check=False)


def statuses(where: Path) -> list[tuple[str, str]]:
    with (where / "sweep" / "summary.csv").open(newline="") as file:
        return [(row["budget"], row["status"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("launcher", PLUGINS)
def test_presets_compose(launcher: str) -> None:
    assert f"`hydra/launcher={launcher}`" in PAGE
    needs(launcher)
    check(["recipe=snapkv", f"hydra/launcher={launcher}"], multirun=True)


PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text("utf-8").replace("\\\n", " ")
COMMANDS = re.findall(r"^ {4}kvcompile -m (.+)$", PAGE, re.M)


@pytest.mark.parametrize("said", COMMANDS)
def test_the_commands_of_the_page_compose(said: str) -> None:
    words = shlex.split(said.replace("<head>", "head"))
    for word in words:
        if word.startswith("hydra/launcher="):
            needs(word.partition("=")[2])
    check(words, multirun=True)


@pytest.mark.parametrize("launcher", PLUGINS)
def test_a_launcher_that_is_not_installed_names_its_extra(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Plugins.instance()  # finds those that are
    known = ConfigStore.instance().repo["hydra"].setdefault("launcher", {})
    for name in [name for name in known if name != "basic.yaml"]:
        monkeypatch.delitem(known, name)
    with pytest.raises(KvcompileError, match=re.escape(f"pip install 'kvcompile[{PLUGINS[launcher]}]'")):
        check(["recipe=snapkv", f"hydra/launcher={launcher}"], multirun=True)


@pytest.mark.parametrize("launcher", ["kv_joblib", "kv_slurm_local"])
def test_jobs_run_side_by_side_and_once(model: Path, tmp_path: Path, launcher: str) -> None:
    """Each line says of which job it is; the cores are shared; a sweep repeated does what it has not done."""
    needs(launcher)
    words = command(model, launcher, "recipe=snapkv", *QUICK)
    done = run(tmp_path, [*words, "budget=0.5,0.25"])
    assert done.returncode == 0, done.stderr
    assert statuses(tmp_path) == [("0.5", "ok"), ("0.25", "ok")]
    logs = done.stdout + "".join(path.read_text() for path in tmp_path.glob("sweep/.submitit/*/*.out"))
    for job in (0, 1):
        assert f"job {job} | snapkv-llama" in logs
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("sweep/*/*/report.json")]
    threads = max(1, (os.cpu_count() or 1) // 2) if launcher == "kv_joblib" else 1
    assert all(f" {threads} thread" in report["machine"] for report in reports), "not all cores each"

    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/*/*/manifest.json")}
    assert len(written) == 2
    if launcher == "kv_joblib":
        again = run(tmp_path, [*words, "budget=0.5,0.25"])
        assert again.returncode == 0, again.stderr
        assert statuses(tmp_path) == [("0.5", "ok"), ("0.25", "ok")]
        assert "job 0 is done already" in again.stdout
        assert {path: path.stat().st_mtime_ns for path in written} == written, "none twice"


def test_a_worker_of_ray_is_killed_and_the_sweep_repeated(model: Path, tmp_path: Path) -> None:
    """No row is lost, and none is measured twice."""
    needs("kv_ray")
    text = f"tasks.perplexity.texts=['{model / 'words.txt'}']"
    options = ["tasks.perplexity.tokens=100", "tasks.perplexity.scored=200", "tasks.perplexity.windows=8"]
    sweep = ["recipe=snapkv", "kernels=sdpa", "evaluate=[perplexity]", text, *options, "budget=0.5,0.4,0.3"]
    words = command(model, "kv_ray", *sweep, "evaluate.rows=rows", "+hydra.launcher.ray.init.num_cpus=2")
    folder = tmp_path / "rows"
    first = [*words, "hydra.launcher.ray.remote.max_retries=0"]
    with subprocess.Popen(
        first, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        os.kill(worker(folder, process), signal.SIGKILL)
        said = process.communicate()[1]
    assert process.returncode == 1
    last = said.strip().splitlines()[-1]
    assert "every job of a sweep must come back" in last
    assert f"hydra.sweep.dir={tmp_path / 'sweep'}" in last
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.row.json")}
    assert 1 <= len(kept) < 4, "three stacks and the uncompressed model"

    done = run(tmp_path, words)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    there = list(rows.found([folder]))
    assert len(there) == len({row.stack for row in there}) == 4
    assert [status for _, status in statuses(tmp_path)] == ["ok"] * 3


def worker(folder: Path, sweep: subprocess.Popen[str]) -> int:
    """The process that measures a row when one is there already."""
    while sweep.poll() is None:
        claims = list(folder.glob(".*.claim")) if list(folder.glob("*.row.json")) else []
        for claim in claims:
            if (folder / f"{claim.name[1:].removesuffix('.claim')}.row.json").exists():
                continue  # it is about to be given up
            try:
                return int(json.loads(claim.read_text())["pid"])
            except (OSError, ValueError):
                continue  # it was about to be written, or is done
        time.sleep(0.005)
    raise AssertionError(f"the sweep ended by itself: {sweep.stderr and sweep.stderr.read()}")
