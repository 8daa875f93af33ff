"""Launchers of many processes: torchrun trains on all of them, one of them writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from healing import STEP, written
from tiny import tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.report import files


@pytest.mark.parametrize("stack", [["policy=[mqa]"], ["policy=[block_transformer]", "heal.layers=0"]], ids=" ".join)
def test_torchrun_trains_on_two_processes_and_writes_one_artifact(stack: list[str], tmp_path: Path) -> None:
    data = written(tmp_path)
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "kvcompile"]
    overrides = [
        *stack,
        f"model.pretrained={tmp_path / 'model'}",
        "model.device=cpu",
        f"output={tmp_path / 'out'}",
        f"heal.dataset={data}",
        f"heal.tokens={6 * 2 * STEP}",
        "heal.length=32",
        "heal.batch=8",
        "perplexity.context=24",
        "perplexity.tokens=16",
        "needle.enabled=false",
        "speed.enabled=false",
    ]
    done = subprocess.run(
        [sys.executable, *launcher, *overrides],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = files.read(tmp_path / "out").healed
    assert record is not None
    assert (record.steps, record.tokens) == (6, 6 * 2 * STEP), "a step is as many tokens as all processes read"
    assert record.perplexity[2] != record.perplexity[1]
    assert done.stdout.count("Before and after") == 1
    kvcompile.load(tmp_path / "out")
    assert not (tmp_path / "out-heal").exists()
