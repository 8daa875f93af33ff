"""Sweeps in several processes, by Hydra's launchers: each job is told from the others and done once, whatever dies."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from tiny import tiny_model, tiny_tokenizer

from kvcompile.config.compose import check
from kvcompile.errors import KvcompileError

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
    (folder / "words.txt").write_text(
        " ".join(f"W{4 + (7 * i * i + i) % 120} w5 w6 w7 w8 w9 w10 w11." for i in range(400))
    )
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
