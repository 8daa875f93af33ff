"""The exporters as a user names them: options, refusals before any work, whole folders or none, the command line."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny import tiny_config, tiny_model, tiny_tokenizer

import kvcompile
from kvcompile import compiler
from kvcompile.adapters.architectures import describe
from kvcompile.artifact import artifact, manifest
from kvcompile.config.compose import compose
from kvcompile.config.recipe import from_recipe, to_recipe
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError
from kvcompile.exporters import registry
from kvcompile.exporters.base import Exporter
from kvcompile.exporters.registry import build_exporters, require_open
from kvcompile.job import compile_and_report
from kvcompile.plan.plan import Plan
from kvcompile.progress import silent
from kvcompile.report import units
from kvcompile.report.files import read
from kvcompile.stack import apply_stack, build_stack, plan_stack


@dataclass(frozen=True)
class Shut(Exporter):
    name: ClassVar[str] = "shut"
    summary: ClassVar[str] = "never opens"

    def refuse(self, plan: Plan, model_config: Any) -> None:
        raise KvcompileError("this exporter writes nothing", "a plan")


@dataclass(frozen=True)
class Broken(Exporter):
    name: ClassVar[str] = "broken"
    summary: ClassVar[str] = "fails half-way"

    def refuse(self, plan: Plan, model_config: Any) -> None:
        pass

    def write(self, model: Any, tokenizer: Any, folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt


@pytest.fixture
def more_doors(monkeypatch: pytest.MonkeyPatch) -> None:
    exporters = {**registry.discover(), "shut": Shut, "broken": Broken}
    monkeypatch.setattr(registry, "EXPORTERS", dict.fromkeys(exporters, ""))
    monkeypatch.setattr(registry, "discover", lambda: exporters)


def plan_of(*stack: str, model: str = "llama") -> Plan:
    return apply_stack(describe(tiny_config(model)), build_stack(stack, {}))


def test_exporters_are_options_of_export() -> None:
    assert list(compose(["export=[hf]"]).export) == ["hf"]
    assert list(compose(["export=hf"]).export) == ["hf"]
    assert compose(["export=[hf]", "export.hf.weights_only=true"]).export == {"hf": {"weights_only": True}}
    assert finish(Config(export={"hf": {}})).export == {"hf": {"weights_only": False}}
    config = compose(["policy=[gqa]", "export=[hf]"])
    assert from_recipe(to_recipe(config)) == config
    assert [type(exporter) for exporter in config.exporters()] == [registry.discover()["hf"]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["export=[hff]"], "unknown exporter, got 'hff'. Fix: did you mean 'hf'?"),
        (["export=[hf,hf]"], "each exporter may be in export once"),
        (
            ["export.hf.weights_only=true"],
            "options of an exporter need it in export=[...], got export.hf. Fix: export=[hf]",
        ),
        (["export=[hf]", "export.hf.weight=true"], "did you mean 'weights_only'?"),
        (["export=[hf]", "export.hf.weights_only=5.5"], "5.5"),
        (["artifact=x"], "artifact=<folder> exports or evaluates what is compiled"),
        (["artifact=x", "export=[hf]", "policy=[gqa]"], "compiled already, got artifact=x with policies"),
        (["artifact=x", "export=[hf]", "recipe=gqa"], "with recipe=gqa"),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(KvcompileError) as caught:
        compose(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_python_names_exporters_as_the_command_line_does() -> None:
    with pytest.raises(KvcompileError, match=r"unknown exporter, got 'hff'. Fix: did you mean 'hf'"):
        kvcompile.export("nowhere", "hff", "out")
    with pytest.raises(KvcompileError, match=r"unknown field of export.hf, got 'weight'"):
        kvcompile.export("nowhere", "hf", "out", weight=True)
    with pytest.raises(KvcompileError, match="only a compiled model is exported, got LlamaForCausalLM"):
        kvcompile.export(tiny_model(), "hf", "out")


@pytest.mark.usefixtures("more_doors")
def test_a_refusal_names_the_reason_and_the_exporters_that_are_open() -> None:
    with pytest.raises(KvcompileError, match=r"export=shut: this exporter writes nothing, .* Fix: export=\[hf\]"):
        require_open(build_exporters({"shut": {}}), plan_of("gqa"), tiny_config("llama"))
    found = registry.open_exporters(plan_of("gqa"), tiny_config("llama"))
    assert found[0] == "hf"
    assert "broken" in found
    assert "shut" not in found


def test_plan_only_asks_the_exporters() -> None:
    with pytest.raises(KvcompileError, match="export=hf: a checkpoint holds weights"):
        compiler.plan_config(compose(["plan=only", "policy=[snapkv]", "export=[hf]"]))
    compiler.plan_config(compose(["plan=only", "policy=[gqa]", "export=[hf]"]))


def test_no_exporter_writes_a_block_transformer() -> None:
    stack = build_stack(["block_transformer", "snapkv"], {})
    plan = plan_stack(describe(tiny_config("llama")), stack).plan
    for name in registry.EXPORTERS:
        with pytest.raises(KvcompileError, match=f"export={name}: a block transformer runs in kvcompile alone"):
            require_open(build_exporters({name: None}), plan, tiny_config("llama"))


def test_a_refusal_comes_before_the_weights(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)  # no weights there: reading them would be another error
    config = compose([f"model.pretrained={tmp_path}", "policy=[cla]", "export=[hf]"])
    from kvcompile.job import compile_config

    with pytest.raises(KvcompileError, match="export=hf: no stock class"):
        compile_config(config)


def test_a_compile_leaves_its_exports_in_the_artifact(tmp_path: Path) -> None:
    off = ["needle.enabled=false", "speed.enabled=false", "perplexity.enabled=false", f"output={tmp_path / 'made'}"]
    outcome = compile_and_report(tiny_model(), tiny_tokenizer(), compose(["policy=[gqa]", "export=[hf]", *off]), silent)
    made = Path(outcome.path)
    files = {p.relative_to(made / "export/hf").as_posix(): p.stat().st_size for p in (made / "export/hf").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert read(made).exports == {"hf": files}
    told = " ".join((made / "report.md").read_text().split())
    assert f"export/hf/model.safetensors | {units.size(files['model.safetensors'])}" in told
    assert "export/hf/model.safetensors" in manifest.read(made).files
    assert kvcompile.load(made).kvcompile.plan.layers[0].kv_heads == 1


@pytest.mark.usefixtures("more_doors")
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupt_leaves_the_folder_as_it_was(there: bool, tmp_path: Path) -> None:
    model = kvcompile.compile(tiny_model(), overrides=["policy=[gqa]"])
    target = tmp_path / "out"
    if there:
        target.mkdir()
    with pytest.raises(KeyboardInterrupt):
        kvcompile.export(model, "broken", target)
    assert [p.name for p in tmp_path.rglob("*")] == (["out"] if there else [])
    assert "config.json" in kvcompile.export(model, "hf", target).files


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    model = kvcompile.compile(tiny_model(), overrides=["policy=[gqa]"])
    with pytest.raises(KvcompileError, match="goes into a new folder"):
        kvcompile.export(model, "hf", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_artifact_is_exported_from_the_command_line(tmp_path: Path) -> None:
    model = kvcompile.compile(tiny_model(), overrides=["policy=[gqa]"])
    artifact.save(model, tmp_path / "a", tiny_tokenizer())
    code = "from kvcompile.cli import main; main()"
    command = [sys.executable, "-c", code, "artifact=a", "export=[hf]"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "export hf: a-export/hf, " in done.stdout
    assert json.loads((tmp_path / "a-export/hf/config.json").read_text())["num_key_value_heads"] == 1
    assert (tmp_path / "a-export/hf/tokenizer.json").is_file()


@pytest.mark.parametrize("name", registry.EXPORTERS)
def test_an_exporter_module_imports_nothing_heavy(name: str) -> None:
    spec = find_spec(registry.EXPORTERS[name].partition(":")[0])
    assert spec is not None
    assert spec.origin is not None
    tops = set()
    for node in ast.parse(Path(spec.origin).read_text("utf-8")).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        tops |= {n.split(".")[0] for n in names}
    assert tops <= {"__future__", "kvcompile", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", registry.EXPORTERS)
def test_every_exporter_says_what_it_is(name: str) -> None:
    cls = registry.discover()[name]
    assert cls.name == name
    assert 10 < len(cls.summary) < 90
