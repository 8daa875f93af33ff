"""Texts of kernels in an artifact: what would run, the same in every process, and compared when they are loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forged import refused, signed
from tiny import tiny_ids, tiny_model

import kvcompile
from kvcompile.artifact import artifact, kernel_texts
from kvcompile.errors import KvcompileError
from kvcompile.kernels.cpp import backend, build, choose, compact, encode, ghost, simd
from kvcompile.kernels.dispatch import CPP, TRITON, named
from kvcompile.kernels.spec import KernelSpec, Part, plain
from kvcompile.models import provenance
from kvcompile.plan.storage import Codec

STACK = ("policy=[adakv,kivi]", "budget=0.5", "stack.kivi.group=16", "stack.kivi.residual=16")
KEY, VALUE = Codec("int4", "channel", 16), Codec("int4", "token", 16)
BODY = Part("ragged", KEY, VALUE)
STORED = KernelSpec((BODY, *plain("ragged", "float32")), 2, 16, 16, 0.25)
SAVED = "kernels/ragged-int4c16_int4t16+ragged-float32-g2-d16"
BY_CPP = {
    "dense-float32-g2-d16",
    "ragged-float32-g2-d16",
    "ragged-int4c16_int4t16+dense-float32-g2-d16",
    "ragged-int4c16_int4t16+ragged-float32-g2-d16",
}

needs_compiler = pytest.mark.skipif(build.available() is not None, reason="no C++ compiler here")


@pytest.fixture(scope="module")
def model() -> Any:
    return kvcompile.compile(tiny_model(), overrides=STACK)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    return artifact.save(model, tmp_path_factory.mktemp("made") / "artifact")


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    """An artifact that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "artifact"))


def older(folder: Path) -> None:
    signed(folder, versions={**provenance.versions(), "kvcompile": "0.0.1"})


@needs_compiler
def test_every_kernel_that_may_run_is_there_and_it_is_the_text_that_is_compiled(made: Path) -> None:
    files = {p.name for p in (made / "kernels").iterdir()}
    kernels = {f"{name}-{kind}.cpp" for name in BY_CPP for kind in ("step", "chunk")}
    moves = {f"compact-{way}-64-64-4.cpp" for way in ("dense-dense", "dense-ragged", "ragged-ragged", "ragged")}
    moves.add("compact-ragged-ragged-8-64c16-8-4-4.cpp")  # codes of 16 channels, scales of 16 tokens and of one
    assert files == kernels | moves | {
        "kernels.json",
        "layers.md",
        "simd.h",
        "encode-int4c16-d16.cpp",
        "encode-int4t16-d16.cpp",
    }
    include = '#include "simd.h"\n\n'
    step = (made / f"{SAVED}-step.cpp").read_text()
    assert step == include + backend.source(STORED, torch.float32)
    assert (made / f"{SAVED}-chunk.cpp").read_text() == include + backend.source(STORED, torch.float32, many=True)
    assert (made / "kernels/encode-int4c16-d16.cpp").read_text() == include + encode.source(KEY, 16, "float32")
    assert (made / "kernels/simd.h").read_text() == simd.prelude()
    index = json.loads((made / "kernels/kernels.json").read_text())
    assert (index["backend"], index["device"]) == ("cpp", "")
    assert index["layers_by_kernel"] == {name: [0, 1, 2, 3] for name in files if name.endswith(".cpp")}


@needs_compiler
def test_the_texts_that_run_are_among_those_that_are_shown(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, decoding past an encoding, a second turn and a padded batch compile nothing that is not shown."""
    ran: list[str] = []
    loaded = build.load
    monkeypatch.setattr(backend, "_kernels", {})
    monkeypatch.setattr(backend, "_recent", {})
    compact._kernel.cache_clear()
    monkeypatch.setattr(build, "load", lambda text, name, *rest: ran.append(text) or loaded(text, name, *rest))
    ids, mask = tiny_ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, :9] = 0
    for wanted in (torch.ones_like(mask), mask):
        out = model.generate(ids, attention_mask=wanted, max_new_tokens=40, do_sample=False, eos_token_id=None)
    cache = model.new_cache()
    for turn in (out[:, :50], out[:, 50:70], out[:, 70:]):
        model(turn, past_key_values=cache)
    shown = kernel_texts.of_model(model)
    written = {text.removeprefix('#include "simd.h"\n\n') for text in shown.values()}
    texts = {text.removeprefix(shown["kernels/simd.h"]) for text in ran}
    assert len({t for t in texts if "attend_step" in t}) >= 2
    assert any("attend_chunk" in t for t in texts)
    assert len({t for t in texts if "void compact(" in t}) >= 3
    assert texts <= written


@needs_compiler
def test_kernels_that_add_up_for_a_score_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kvcompile.compile(tiny_model(), overrides=("policy=snapkv", "budget=0.5", "stack.snapkv.window=8"))
    name = "kernels/dense-float32-g2-d16-scores-window"
    shown = kernel_texts.of_model(model)
    assert {f"{name}.py", f"{name}-split.py"} <= set(kernel_texts.files(model.kvcompile.plan, TRITON))
    assert json.loads(shown["kernels/kernels.json"])["layers_by_kernel"][f"{name[8:]}.cpp"] == [0, 1, 2, 3]
    ran: list[str] = []
    loaded = build.load
    monkeypatch.setattr(backend, "_kernels", {})
    monkeypatch.setattr(build, "load", lambda text, kind, *rest: ran.append(text) or loaded(text, kind, *rest))
    model(tiny_ids(1, 40))
    assert [simd.prelude() + shown[f"{name}.cpp"].removeprefix('#include "simd.h"\n\n')] == [
        text for text in ran if "void compact(" not in text
    ]


@needs_compiler
@pytest.mark.parametrize("storage", ["", "kivi"])
def test_what_a_recall_runs_is_shown(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chooser, and attention over what it chooses."""
    small = ("stack.quest.page=4", "stack.quest.sinks=2", "stack.quest.recent=4", "stack.quest.skip_layers=[1]")
    kivi = ("policy=[quest,kivi]", "stack.kivi.group=8", "stack.kivi.residual=8")
    wanted = (*(kivi if storage else ("policy=quest",)), "stack.quest.budget=8", *small)
    model = kvcompile.compile(tiny_model(), overrides=wanted)
    ran: list[str] = []
    loaded = build.load
    monkeypatch.setattr(backend, "_kernels", {})
    monkeypatch.setattr(backend, "_recent", {})
    choose._kernel.cache_clear()
    monkeypatch.setattr(build, "load", lambda text, name, *rest: ran.append(text) or loaded(text, name, *rest))
    model.generate(tiny_ids(1, 60), max_new_tokens=40, do_sample=False, eos_token_id=None)
    shown = kernel_texts.of_model(model)
    written = {text.removeprefix('#include "simd.h"\n\n') for text in shown.values()}
    texts = {text.removeprefix(shown["kernels/simd.h"]) for text in ran}
    assert {t for t in texts if "attend" in t or "void choose(" in t} <= written
    assert sum("void choose(" in t for t in texts) == 1
    assert any("rows in pages of 1 entries" in t for t in texts)
    index = json.loads(shown["kernels/kernels.json"])["layers_by_kernel"]
    assert index["choose-bounds-mean-float32-g2-d16.cpp"] == [0, 2, 3]
    assert index["paged1-float32-g2-d16-step.cpp"] == [0, 2, 3]


@needs_compiler
def test_what_demotes_is_shown() -> None:
    """Where every decoded token may push an entry into the low tier; not where it is decided once."""
    leankv, tiers = (kvcompile.compile(tiny_model(), overrides=(f"policy={name}",)) for name in ("leankv", "tiers"))
    name = "demote-int8t-int4t-int4t-int2t-float32-d16.cpp"
    shown = kernel_texts.of_model(leankv)
    assert "void demote(" in shown[f"kernels/{name}"]
    assert json.loads(shown["kernels/kernels.json"])["layers_by_kernel"][name] == [0, 1, 2, 3]
    assert f"kernels/{name}" not in kernel_texts.of_model(tiers)


@needs_compiler
def test_what_scores_ghosts_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very text that runs; where a layer has a sliding window, with chunks that end with it."""
    ran: list[str] = []
    loaded = build.load
    ghost._kernel.cache_clear()
    monkeypatch.setattr(build, "load", lambda text, name, *rest: ran.append(text) or loaded(text, name, *rest))
    model = kvcompile.compile(tiny_model(), overrides=("policy=[ghost,global_topk]", "stack.global_topk.budget=0.3"))
    model(tiny_ids(1, 60))
    shown = kernel_texts.of_model(model)
    name = "ghost-c256-b8-s4-float32-g2-d16.cpp"
    scoring = [text for text in ran if "void ghost(" in text]
    assert scoring == [simd.prelude() + shown[f"kernels/{name}"].removeprefix('#include "simd.h"\n\n')]
    assert json.loads(shown["kernels/kernels.json"])["layers_by_kernel"][name] == [0, 1, 2, 3]


def test_a_backend_of_a_library_shows_no_kernels(tmp_path: Path) -> None:
    model = kvcompile.compile(tiny_model(), overrides=(*STACK, "kernels=sdpa"))
    path = artifact.save(model, tmp_path / "a")
    assert {p.name for p in (path / "kernels").iterdir()} == {"kernels.json", "layers.md"}
    assert json.loads((path / "kernels/kernels.json").read_text())["backend"] == "sdpa"
    assert kvcompile.load(path)


@pytest.mark.parametrize("chosen", ["cpp", "triton"])
def test_an_artifact_of_another_machine_is_compared_for_the_backend_that_wrote_it(
    chosen: str, model: Any, folder: Path
) -> None:
    """Neither a compiler nor a GPU nor Triton is needed to see that the texts are as they should be."""
    for path in (folder / "kernels").iterdir():
        path.unlink()
    for name, text in kernel_texts.files(model.kvcompile.plan, named(chosen), "a GPU").items():
        (folder / name).write_text(text)
    signed(folder)
    shown = {p.name for p in (folder / "kernels").iterdir()}
    ends = {"cpp": ["step.cpp", "chunk.cpp"], "triton": ["one.py", "one-split.py", "many.py", "many-split.py"]}[chosen]
    assert {f"{name}-{end}" for name in BY_CPP for end in ends} <= shown
    assert kvcompile.load(folder)
    path = folder / f"{SAVED}-{ends[0]}"
    path.write_text(path.read_text().replace("0", "1", 1))
    signed(folder)
    with pytest.raises(KvcompileError, match="generates from the plan, got altered text"):
        kvcompile.load(folder)


def _index(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "kernels/kernels.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return change


def _append(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + "// more\n")


CODE = sorted(p for p in (f"{SAVED}-step.cpp", "kernels/simd.h", "kernels/encode-int4c16-d16.cpp"))
FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    **{name: (_append(name), rf"{name.split('/')[-1].split('+')[0]}.* generates from the plan") for name in CODE},
    "missing kernel": (lambda f: (f / f"{SAVED}-step.cpp").unlink(), r"step\.cpp must be what kvcompile"),
    "missing index": (lambda f: (f / "kernels/kernels.json").unlink(), r"kernels\.json must be what kvcompile"),
    "another table": (_append("kernels/layers.md"), r"layers\.md must be what kvcompile"),
    "another backend": (_index("backend", "sdpa"), r"kernels\.json must be what kvcompile"),
    "unknown backend": (
        _index("backend", "os.abort"),
        r"kernels\.json must name one of the backends .* got 'os\.abort'",
    ),
    "unhashable backend": (_index("backend", []), r"kernels\.json must name one of the backends"),
    "no device": (_index("device", None), r"kernels\.json must name"),
    "no index": (lambda f: (f / "kernels/kernels.json").write_text("[1]"), r"kernels\.json must name a backend"),
}


@needs_compiler
@pytest.mark.parametrize("kind", FORGED)
def test_altered_texts_are_refused_in_one_line(kind: str, folder: Path) -> None:
    forge, words = FORGED[kind]
    forge(folder)
    signed(folder)
    refused(folder, words)


@needs_compiler
@pytest.mark.parametrize("kind", ["missing index", "kernels/simd.h"])
def test_another_version_may_have_written_other_texts(kind: str, folder: Path, model: Any) -> None:
    FORGED[kind][0](folder)
    older(folder)
    with pytest.warns(UserWarning, match=r"kernels of kvcompile 0\.0\.1; those that run were generated by \d"):
        loaded = kvcompile.load(folder)
    ids = tiny_ids(1, 60)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_another_version_that_wrote_the_same_texts_is_no_news(folder: Path) -> None:
    older(folder)
    assert kvcompile.load(folder)  # a warning would be an error here


@needs_compiler
def test_nothing_is_compiled_from_an_artifact(folder: Path) -> None:
    trap = '#error "compiled from an artifact"\n'
    for path in (folder / "kernels").glob("*.[ch]*"):
        path.write_text(trap)
    older(folder)
    code = f"import kvcompile, torch; model = kvcompile.load({str(folder)!r});"
    code += "model.generate(torch.arange(4, 64)[None], max_new_tokens=3, do_sample=False, eos_token_id=None)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd="/", check=False).returncode == 0


def test_a_dtype_asked_for_on_load_is_no_difference(folder: Path) -> None:
    assert kvcompile.load(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_specs_that_differ_in_scale_alone_have_files_of_their_own(model: Any) -> None:
    plan = model.kvcompile.plan
    first, *rest = plan.layers
    files = kernel_texts.files(replace(plan, layers=(replace(first, scale=0.5), *rest)), TRITON)
    index = json.loads(files[kernel_texts.INDEX])["layers_by_kernel"]
    assert index["dense-float32-g2-d16-one.py"] == [0]
    assert index["dense-float32-g2-d16-x0.25-one.py"] == [1, 2, 3]
    assert files["kernels/dense-float32-g2-d16-one.py"] != files["kernels/dense-float32-g2-d16-x0.25-one.py"]


def test_texts_are_the_same_in_every_process(model: Any) -> None:
    code = """
import hashlib, sys
from tiny import tiny_config
from kvcompile.artifact import kernel_texts
from kvcompile.kernels.dispatch import CPP, TRITON
from kvcompile.build import plan_of
from kvcompile.config.compose import compose
config = compose(["model=llama", *sys.argv[1:]])
plan = plan_of(tiny_config("llama"), "float32", config, config.policies())
for backend in (CPP, TRITON):
    print(hashlib.sha256(repr(list(kernel_texts.files(plan, backend).items())).encode()).hexdigest())
"""
    mine = [
        hashlib.sha256(repr(list(kernel_texts.files(model.kvcompile.plan, backend).items())).encode()).hexdigest()
        for backend in (CPP, TRITON)
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, *STACK],
        cwd="/",
        env={**environment, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == mine
