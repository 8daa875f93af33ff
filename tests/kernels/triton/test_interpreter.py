"""Generated Triton kernels against the float64 reference, in Triton's interpreter, which needs a process of its own."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]

OLD = triton.__version__ < "3.7" and np.__version__ >= "2.4"


@pytest.mark.skipif(OLD, reason="the interpreter of Triton 3.6 cannot loop under numpy 2.4; it compiles all the same")
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}  # more make numpy's products slower
    environment = {**os.environ, **threads, "TRITON_INTERPRET": "1", "KVCOMPILE_CACHE": str(tmp_path)}
    command = [str(Path(sysconfig.get_path("scripts"), "pytest")), "-q", "--no-header", "-p", "no:cacheprovider"]
    command.append(str(Path(__file__).with_name("interpreted.py")))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
