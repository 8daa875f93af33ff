"""Every script of examples/ runs on a tiny model, and the pages about extensions show some that work."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model and its tokenizer on disk."""
    path = tmp_path_factory.mktemp("model")
    tiny_model(max_position_embeddings=4096).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str, where: Path, path: Path | None = None) -> str:
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def words(count: int) -> str:
    return " ".join(f"w{4 + i * 7 % 120}" for i in range(count))


def test_every_example_is_listed_and_tested() -> None:
    listed = set(re.findall(r"\]\((\w+)[./]", (EXAMPLES / "README.md").read_text("utf-8")))
    assert {path.stem for path in EXAMPLES.iterdir() if path.name != "README.md"} == listed
    assert all(name in Path(__file__).read_text("utf-8") for name in listed)


def test_long_document(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(script("long_document").answer(folder, words(1500), words(20), new=4), str)
    assert re.match(r"1,5\d\d tokens read, 0.0\d MiB of cache held", capsys.readouterr().out)


def test_the_lines_of_the_readme(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert block.count("HuggingFaceTB/SmolLM2-135M-Instruct") == 1
    mine = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", folder)
    exec(mine, {"long_text": words(300), "question": f" {words(20)}"})
    assert capsys.readouterr().out.startswith("w4 w11")


def test_chat(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each turn is answered, and the cache goes on from the turn before."""
    assert len(list(script("chat").chat(folder, [words(30), words(10)], new=4))) == 2
    first, second = (int(line.split()[0]) for line in capsys.readouterr().out.splitlines())
    assert first + 10 < second <= first + 10 + 4 + 4


def test_padded_batch(folder: str) -> None:
    together, alone = script("padded_batch").batch(folder, [words(90), words(40)], new=4)
    assert together == alone


def test_serve_vllm(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
    import vllm_engine

    vllm_engine.require_model()
    served = vllm_engine.export(["policy=[snapkv]", "budget=0.25"], tmp_path / "served")
    assert len(script("serve_vllm").main(str(served), dtype="float32", enforce_eager=True)) == 2


def test_hydra_sweep(folder: str, tmp_path: Path) -> None:
    sweep = ["-m", f"model={folder}", f"prompt={words(60)}", "new=2", "recipe=snapkv,adakv", "budget=0.5,0.25"]
    said = run(sys.executable, str(EXAMPLES / "hydra_sweep.py"), *sweep, where=tmp_path)
    rows = re.findall(r"^(snapkv|adakv) +budget (0.5|0.25) ", said, re.M)
    assert rows == [("snapkv", "0.5"), ("snapkv", "0.25"), ("adakv", "0.5"), ("adakv", "0.25")]


COMPILE = """
import torch, kvcompile
from transformers import AutoModelForCausalLM
for stack in ("[vnorm]", "[vnorm,adakv,kivi]"):
    model = AutoModelForCausalLM.from_pretrained({folder!r})
    model = kvcompile.compile(model, overrides=[f"policy={{stack}}", "stack.vnorm.power=1", "budget=0.25"])
    with torch.no_grad():
        cache = model(torch.arange(4, 124).view(1, -1)).past_key_values
    print(stack, sum(map(sum, cache.lengths())))
"""


def installed(page: str, example: str, where: Path) -> Path:
    """The files that a page shows, which are those of the example, as an installed package."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    blocks = {block for _, block in re.findall(r"```(python|toml)\n(.*?)```", text, re.S)}
    files = {path.name: path.read_text("utf-8") for path in (EXAMPLES / example).iterdir() if path.suffix != ".md"}
    assert set(files.values()) == blocks
    assert len(files) <= 3
    for name, content in files.items():
        (where / name).write_text(content, "utf-8")
    site = where / "site"
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    run(sys.executable, *pip, str(where), where=where)
    return site


def test_own_policy(folder: str, tmp_path: Path) -> None:
    """Installed, it is a policy like any other."""
    site = installed("add-a-policy.md", "own_policy", tmp_path)
    assert "vnorm" in run(sys.executable, "-m", "kvcompile", "ls", where=tmp_path, path=site)
    said = run(sys.executable, "-c", COMPILE.format(folder=folder), where=tmp_path, path=site)
    assert said.splitlines() == [f"{stack} {4 * 2 * 30}" for stack in ("[vnorm]", "[vnorm,adakv,kivi]")]


DUET = """
import sys, torch, kvcompile
from modeling_duet import DuetConfig, DuetForCausalLM
sys.path.insert(0, {tests!r})
from tiny import BASE, tiny_tokenizer
torch.manual_seed(0)
model, ids = DuetForCausalLM(DuetConfig(**BASE)).eval(), torch.arange(4, 124).view(1, -1)
model.save_pretrained("duet")
tiny_tokenizer().save_pretrained("duet")
with torch.no_grad():
    expected = model(ids).logits
    print(bool((kvcompile.compile(model)(ids).logits - expected).abs().max() < 1e-5))
"""
CONVERT = """
import sys, torch, kvcompile
stacks = [
    ["policy=[gqa,rotate,int8]", "stack.gqa.kv_heads=1"],
    ["policy=[cla,snapkv]", "budget=0.5"],
    ["policy=[mla]", "stack.mla.factor=weights", "stack.mla.select=high"],
]
ids = torch.arange(4, 124).view(1, -1)
for n, stack in enumerate(stacks):
    assert "modeling_duet" not in sys.modules or n
    compiled = kvcompile.compile("llama", overrides=["model.pretrained=duet", *stack])
    with torch.no_grad():
        out = compiled(ids)
        kvcompile.save(compiled, f"saved-{n}")
        print(type(compiled).__name__, sum(map(sum, out.past_key_values.lengths())), float(out.logits.sum()))
"""
LOAD = """
import torch, kvcompile
for n in range(3):
    compiled = kvcompile.load(f"saved-{n}")
    with torch.no_grad():
        out = compiled(torch.arange(4, 124).view(1, -1))
        print(type(compiled).__name__, sum(map(sum, out.past_key_values.lengths())), float(out.logits.sum()))
"""


def test_own_architecture(tmp_path: Path) -> None:
    """Installed, it is compiled, converted, saved and loaded as any other; nobody imports it by hand."""
    site = installed("add-an-architecture.md", "own_architecture", tmp_path)
    made = run(sys.executable, "-c", DUET.format(tests=str(ROOT / "tests")), where=tmp_path, path=site)
    assert made.split() == ["True"]
    said = run(sys.executable, "-c", CONVERT, where=tmp_path, path=site)
    assert [line.split()[:2] for line in said.splitlines()] == [
        ["DuetForCausalLM", str(n)] for n in (4 * 120, 2 * 2 * 60, 4 * 120)
    ]
    assert run(sys.executable, "-c", LOAD, where=tmp_path, path=site) == said


TOY = """
import torch, toy, kvcompile
from transformers import AutoModelForCausalLM
from kvcompile.errors import KvcompileError
from kvcompile.kernels.dispatch import choose
from kvcompile.job import _kernels
ids = torch.arange(4, 124).view(1, -1)
def out(backend):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained({folder!r})
    stack = ["policy=[h2o,kivi]", "budget=0.5", "stack.h2o.decode_every=4", "stack.kivi.residual=32"]
    model = kvcompile.compile(model, overrides=[*stack, f"kernels={{backend}}"])
    with torch.no_grad():
        cache = model(ids[:, :-1]).past_key_values
        return model, model(ids[:, -1:], past_key_values=cache).logits, cache.lengths()
(mine, logits, kept), (_, expected, same) = out("toy"), out("reference")
print(bool((logits - expected).abs().max() < 1e-5), kept == same)
print(sum(toy.CALLS.values()), _kernels(mine)[0].split(": ")[1])
kvcompile.save(mine, "saved")
kvcompile.load("saved")
for backend, device in (("toy", "meta"), ("tyo", "cpu")):
    try:
        choose(backend, device)
    except KvcompileError as error:
        print(error)
"""


def test_own_backend(folder: str, tmp_path: Path) -> None:
    """Installed, it attends where it is asked for, is named where backends are, and refused where it cannot run."""
    site = installed("add-a-backend.md", "own_backend", tmp_path)
    said = run(sys.executable, "-W", "ignore", "-c", TOY.format(folder=folder), where=tmp_path, path=site).splitlines()
    assert said[:2] == ["True True", f"{4 * 2} toy"], "every layer, at the prompt and at a token"
    assert said[2].startswith("kernels=toy runs on a CPU, got a model on meta")
    assert said[3].startswith("kernels must be one of auto, cpp, triton, sdpa, reference, toy, got 'tyo'")
    assert '"backend": "toy"' in (tmp_path / "saved" / "kernels" / "kernels.json").read_text("utf-8")
    assert "| toy " in (tmp_path / "saved" / "kernels" / "layers.md").read_text("utf-8")
    command = [sys.executable, "-m", "kvcompile", "recipe=snapkv", f"model.pretrained={folder}", "kernels=tyo"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "did you mean 'toy'? Known: auto, cpp, triton, sdpa, reference, toy" in done.stderr
