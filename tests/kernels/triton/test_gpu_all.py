"""The script for a machine with a GPU: it says plainly where there is none, and what it checks elsewhere is checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "benchmarks/gpu_all.py"


def run(folder: Path, interpret: bool, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"KVCOMPILE_CACHE": str(folder)} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_plainly(tmp_path: Path) -> None:
    done = run(tmp_path, False, "--out", str(tmp_path / "page"))
    assert done.returncode == 1
    assert "No GPU here, so nothing was run" in done.stderr
    assert not list(tmp_path.glob("page*"))


def test_kernels_are_checked_in_the_interpreter(tmp_path: Path) -> None:
    asked = ["--recipes", "cla", "--dtypes", "float32", "--parts", "kernels", "--workers", "2", "--seconds", "2000"]
    done = run(tmp_path, True, *asked, "--out", str(tmp_path / "page"))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    page = (tmp_path / "page.md").read_text()
    assert "Nothing went wrong" in page
    _, dtype, count, right, difference, _ = page.splitlines()[-1].split("|")
    assert (dtype.strip(), int(count)) == ("float32", int(right))
    assert int(count) > 0
    assert 0 < float(difference) < 1e-3


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_all

    yield gpu_all
    sys.modules.pop("gpu_all", None)


def test_a_part_that_hangs_or_fails_leaves_what_it_printed(script: Any) -> None:
    parts = script.Parts(20.0, None)
    parts.end -= 10.0  # so much is left of it that the first part's share is over
    hangs = "print('one', flush=True); import time; time.sleep(600)"
    assert parts.run("doctor", [[sys.executable, "-c", hangs]])[0] in ("", "one\n")
    assert parts.run("times", [[sys.executable, "-c", "print('two'); raise SystemExit(3)"]]) == ["two\n"]
    assert parts.problems == ["doctor: ended after its share of 20 s", "times: exit code 3"]


def test_what_is_wrong_is_on_the_page(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = script.Parts(20.0, None)
    lines = [
        '{"kernels": 3}',
        '{"kernel": "a", "dtype": "float16", "error": 0.5, "problem": "one new token"}',
        '{"kernel": "b", "dtype": "float16", "error": 0.001, "problem": ""}',
    ]
    monkeypatch.setattr(parts, "run", lambda part, commands: ["\n".join(lines)])
    script.kernels(parts, script.argparse.Namespace(dtypes=["float16"], recipes=["cla"], workers=1))
    assert parts.problems == ["kernels: 1 were not reached", "a for float16: one new token, 5.0e-01"]
    assert "- a for float16" in parts.page()
    assert "|         2 |       1 |" in parts.page()
