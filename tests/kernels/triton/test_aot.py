"""Kernels compile for GPUs that are not here, without spilling; benchmarks/triton_aot.py does it for every recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]


def test_a_sample_compiles_ahead_of_time_without_spills(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"KVCOMPILE_CACHE": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "compiled")}
    command = [sys.executable, str(ROOT / "benchmarks/triton_aot.py"), "--sample"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for codec in ("float16", "int4c32_int4t32", "int2c32_int2t32", "int8t", "float8t"):
        assert codec in done.stdout
    assert "0 of 25 kernels spill" in done.stdout
