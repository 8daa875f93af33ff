"""The package on the page about attentions, installed as it stands there: sinks and a soft-cap reach every kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch

from kvcompile.kernels.cpp import build

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "add-an-attention.md").read_text("utf-8")
MODEL, ARCHITECTURE, CALL = re.findall(r"```python\n(.*?)```", PAGE, re.S)
(PROJECT,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)

RUN = """
import copy, sys, torch
sys.path.insert(0, {tests!r})
from tiny import BASE, tiny_ids
from kvcompile.adapters.architectures import describe
from kvcompile.artifact import artifact
from kvcompile.compiler import assemble
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.job import _kernels
from modeling_anchor import AnchorConfig, AnchorForCausalLM

torch.manual_seed(0)
model = AnchorForCausalLM(AnchorConfig(**BASE)).eval()
for layer in model.model.layers:
    torch.nn.init.normal_(layer.self_attn.sinks)
plan = describe(model.config)
print({{(p.softcap, p.sink) for p in plan.layers}})
ids = tiny_ids(2, 40)

def logits(model):
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        return model(ids[:, -1:], past_key_values=cache).logits

def compiled(kernels, **stack):
    return assemble(copy.deepcopy(model), finish(Config(stack=stack, kernels=kernels)))

exact = logits(model)
for kernels in {backends!r}:
    ours = compiled(kernels)
    print(bool((logits(ours) - exact).abs().max() < 2e-5), _kernels(ours)[0])
    small = compiled(kernels, gqa={{"kv_heads": 1}}, h2o={{"budget": 0.5, "decode_every": 4}})
    loaded = artifact.load(artifact.save(small, f"{folder}/{{kernels}}"))
    print(torch.equal(logits(small), logits(loaded)))
for layer in model.model.layers:
    layer.self_attn.sinks.data.fill_(-1e4)
print(bool((logits(model) - exact).abs().max() > 1e-2))
"""


def installed(folder: Path) -> Path:
    """The three files, as pip would leave them."""
    project = tomllib.loads(PROJECT)["project"]
    info = folder / f"kvcompile_anchor-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, points),) = project["entry-points"].items()
    (info / "entry_points.txt").write_text("\n".join((f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))))
    (folder / "modeling_anchor.py").write_text(MODEL, "utf-8")
    (folder / "anchor.py").write_text(ARCHITECTURE, "utf-8")
    return folder


def test_the_package_of_the_page(tmp_path: Path) -> None:
    """The model's own logits by every backend; converted, selected, saved and loaded; and sinks matter to it."""
    backends = ["reference", "sdpa", *([] if build.available() else ["cpp"])]
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            RUN.format(tests=str(ROOT / "tests"), folder=str(tmp_path), backends=backends),
        ],
        env={**os.environ, "PYTHONPATH": str(installed(tmp_path / "site")), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts, *lines, heard = done.stdout.splitlines()
    assert facts == "{(5.0, True)}"
    assert heard == "True", "sinks change nothing: this test would be blind"
    for backend, exact, same in zip(backends, lines[::2], lines[1::2], strict=True):
        assert exact == f"True dense-float32-g2-d16-cap5-sink: {backend}"
        assert same == "True"


def test_the_call_of_the_page_is_the_formula() -> None:
    """Soft-cap, bias and sink together, by the formula at the top of the page."""
    n: dict[str, Any] = {}
    exec(CALL, n)
    keys, values, bias = (n[name].double().repeat_interleave(2, 1) for name in ("k", "v", "b"))
    logits = 5 * torch.tanh((n["q"].double() @ keys.mT).squeeze(2) * 0.25 / 5) + bias
    weights = logits.exp() / (n["sinks"].double().exp().view(1, 4, 1) + logits.exp().sum(-1, keepdim=True))
    expected = (weights.unsqueeze(2) @ values).float()
    torch.testing.assert_close(n["out"], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["softcap", "sink", "bias"])
def test_the_page_names_every_part_of_a_variant(name: str) -> None:
    assert f"`{name}`" in PAGE
