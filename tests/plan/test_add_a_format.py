"""The package on the page about number formats, installed as it stands there, runs end to end."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "add-a-format.md").read_text("utf-8")
MODULE, TABLE = re.findall(r"```python\n(.*?)```", PAGE, re.S)
(PROJECT,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)

RUN = """
import sys
sys.path.insert(0, {tests!r})
from tiny import tiny_ids, tiny_model
from kvcompile.artifact import artifact
from kvcompile.compiler import assemble
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.job import _kernels

model = assemble(tiny_model(), finish(Config(stack={{"mulaw": {{}}}})))
ids = tiny_ids(2, 60)
loaded = artifact.load(artifact.save(model, {folder!r}))
print(*(m.generate(ids, max_new_tokens=40, do_sample=False)[:, 60:].tolist() for m in (model, loaded)), sep="\\n")
print(model(ids, use_cache=True).past_key_values.nbytes(), sum(r.bytes for r in model.kvcompile.plan.bytes(2, 60)))
print(model.kvcompile.plan.layers[0].storage.text("float32"))
print(*_kernels(model))
"""


def installed(folder: Path) -> Path:
    """The two files, as pip would leave them."""
    project = tomllib.loads(PROJECT)["project"]
    info = folder / f"kvcompile_mulaw-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (folder / "mulaw.py").write_text(MODULE, "utf-8")
    return folder


def test_the_package_of_the_page(tmp_path: Path) -> None:
    """Found, planned to the byte, saved, loaded, and computed by the library: no kernel reads it as int8."""
    environment = {**os.environ, "PYTHONPATH": str(installed(tmp_path / "site")), "OMP_NUM_THREADS": "1"}
    script = RUN.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "artifact"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second, measured, storage, kernels = done.stdout.splitlines()
    assert first == second
    assert len(set(measured.split())) == 1, measured
    assert storage == "mulaw8t"
    assert "mulaw8t" in kernels
    assert "sdpa (cpp has no kernel for it in float32)" in kernels


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the module of the page defines."""
    module = ModuleType("mulaw")
    monkeypatch.setitem(sys.modules, "mulaw", module)
    exec(compile(MODULE, "mulaw.py", "exec"), vars(module))
    return vars(module)


def test_steps_grow_with_the_number(page: dict[str, Any]) -> None:
    """Half a step of c moves x by ln(256) (|x| + scale / 255) / 255 at most, to first order."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) ** 3
    codes, (scale,) = page["MULAW8"].encode(x, -1)
    wrong = (page["MULAW8"].decode(codes, scale.double()) - x).abs()
    assert bool((wrong <= 1.03 * math.log(256) * (x.abs() + scale / 255) / 255 + 2**-11 * x.abs()).all())
    codes, scales = page["MULAW8"].encode(0 * x, -1)
    assert not page["MULAW8"].decode(codes, *scales).any()


def test_a_table_of_sixteen_numbers_needs_no_functions() -> None:
    """The numbers of FP4 (e2m1), which come back exactly."""
    namespace: dict[str, Any] = {}
    exec(TABLE, namespace)
    fp4 = namespace["FP4"]
    levels = torch.tensor(fp4.levels)
    codes, (scale,) = fp4.encode(levels * 0.25, -1)
    assert torch.equal(fp4.decode(codes, scale.float()), levels * 0.25)
