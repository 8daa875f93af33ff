"""The backend without a GPU: refused by name, in one line, before anything is built; texts are the same every time."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized import case

from kvcompile.errors import KvcompileError
from kvcompile.kernels.dispatch import choose
from kvcompile.kernels.spec import KernelSpec, Part, plain
from kvcompile.kernels.triton import backend, files, tuning
from kvcompile.kernels.triton.emit import Kernels
from kvcompile.kernels.triton.forms import Form, blocks, tile
from kvcompile.plan.storage import Codec

INT4 = Part("paged", Codec("int4", "channel", 32), Codec("int4", "token"), 32)
SPEC = KernelSpec((INT4, *plain("ragged", "float16")), 4, 128, 128, 0.125)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_cpu_is_refused_by_name() -> None:
    spec = KernelSpec(plain("dense", "float32"), 2, 64, 64, 0.125)
    made = case(spec, [[20, 20]], batch=1, heads=2)
    backend.ready.cache_clear()
    pytest.importorskip("triton")
    with pytest.raises(KvcompileError, match="GPU, or on a CPU in Triton's interpreter, got tensors on cpu"):
        backend.attend(made.queries, made.view, spec)
    with pytest.raises(KvcompileError, match="kernels=triton"):
        choose("triton")


def test_without_triton_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.ready.cache_clear()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(KvcompileError, match=r"kvcompile\[triton\]"):
        choose("triton")
    backend.ready.cache_clear()


def test_importing_the_backends_imports_no_triton() -> None:
    code = "import sys, kvcompile.kernels.dispatch; sys.exit('kvcompile.kernels.triton.launch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode == 0


def test_text_is_deterministic_and_has_no_dead_branch() -> None:
    text = Kernels(SPEC, Form()).text
    assert Kernels(replace(SPEC), Form()).text == text
    for absent in ("float8", "e4m3", "softcapped", "held", "WINDOW", "logits", "spread_numbers", "first_after"):
        assert absent not in text, absent
    full = Kernels(replace(SPEC, sliding_window=9, softcap=5.0, sink=True, scores=True), Form()).text
    for present in ("softcapped", "held", "WINDOW", "sinks", "logits", "def column_sums"):
        assert present in full, present


def test_different_kernels_have_different_texts() -> None:
    specs = [
        SPEC,
        replace(SPEC, group=3),
        replace(SPEC, scale=0.25),
        replace(SPEC, scores=True),
        replace(SPEC, softcap=5.0),
        replace(SPEC, sink=True),
        replace(SPEC, sliding_window=9),
        replace(SPEC, parts=SPEC.parts[:1]),
        replace(SPEC, parts=(replace(INT4, page=64), SPEC.parts[1])),
        replace(SPEC, value_dim=64),
    ]
    forms = [Form(), Form("many"), Form(split=False), Form(tile=32), Form("many", work="lse")]
    texts = {Kernels(s, f).text for s in specs for f in forms}
    assert len(texts) >= len(specs) * len(forms) - 1  # tiles of 64 and 32 entries are one where groups hold 32
    assert len({files.digest(t) for t in texts}) == len(texts)


def test_blocks_cross_neither_bytes_nor_groups() -> None:
    assert blocks(128, [Codec("int4", "token", 32), Codec("float16")]).width == 32
    assert blocks(128, [Codec("int2", "channel", 32)]).width == 32
    assert (blocks(80, [Codec("int4", "token", 16)]).width, blocks(80, [Codec("int4", "token", 16)]).wide) == (8, 16)
    assert (blocks(96, [Codec("float16")]).width, blocks(96, [Codec("float16")]).wide) == (96, 128)
    assert [blocks(dim, [Codec("float16")]).width for dim in (256, 320, 576, 1024)] == [256, 160, 192, 256]
    assert blocks(257, [Codec("float16")]).width == 257
    assert blocks(1024, [Codec("int8", "token")]).count == 4
    assert tile(INT4, 64) == 32
    assert tile(replace(INT4, key=Codec("int4", "channel", 48)), 64) == 16
    assert tile(replace(INT4, key=Codec("int4", "channel", 8)), 64) == 64


@pytest.mark.parametrize(
    "part",
    [
        Part("paged", Codec("int4", "channel", 32), Codec("int4", "token"), 16),
        Part("dense", Codec("float64"), Codec("float64")),
        Part("dense", Codec("int2", "token"), Codec("int2", "token", 5)),
    ],
)
def test_what_no_kernel_covers_is_refused(part: Part) -> None:
    with pytest.raises(KvcompileError):
        Kernels(KernelSpec((part,), 1, 64, 64, 1.0), Form())


def test_wide_rows_get_more_warps_and_fewer_stages() -> None:
    """A latent of 1,024 numbers for 32 heads: its sums fit the registers, its tiles the smallest shared memory."""
    wide = KernelSpec(plain("ragged", "float16"), 32, 1024, 768, 0.1, latent=True)
    assert tuning.default(wide, "one") == tuning.Choice(16, 32, 8, 1)
    assert tuning.default(wide, "many") == tuning.Choice(16, 32, 8, 1)
    assert tuning.default(replace(wide, head_dim=256, value_dim=256), "one") == tuning.Choice(16, 32, 4, 2)


def test_splits_fill_the_device_and_never_starve() -> None:
    choice = tuning.default(SPEC, "one")
    assert tuning.splits(choice, 8, 32768, 132) == 64
    assert tuning.splits(choice, 4096, 32768, 132) == 1
    assert tuning.splits(choice, 8, 10, 132) == 1
    assert tuning.splits(replace(choice, splits=3), 8, 10, 132) == 3


def test_one_cache_of_files_serves_many_threads_and_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All see whole files; a file that was tampered with is written anew, and its text never runs."""
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path))
    texts = [f'"""Text {n}."""\nVALUE = {n}\n' + "# line\n" * 2000 for n in range(4)]
    with ThreadPoolExecutor(8) as pool:
        modules = list(pool.map(lambda n: files.load(texts[n % 4], "unit"), range(64)))
    assert [m.VALUE for m in modules] == [n % 4 for n in range(64)]
    assert len({id(m) for m in modules}) == 4
    code = f"from kvcompile.kernels.triton.files import written; print(len(written({texts[0]!r}, 'p').read_text()))"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd="/", stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [int(p.communicate()[0]) for p in runs] == [len(texts[0])] * 3
    assert not list(tmp_path.rglob("*.tmp"))
    path = files.written(texts[1], "unit")
    path.write_text("VALUE = 666")
    assert files.written(texts[1], "unit").read_text() == texts[1]


def test_the_annotated_kernel_is_the_generated_one() -> None:
    """Blocks marked `python` in the docs are the main function, in order; blocks marked `py` are fragments."""
    page = (files.FRAGMENTS.parents[2] / "docs" / "kernels-triton.md").read_text("utf-8")
    part = Part("ragged", Codec("int4", "channel", 32), Codec("int4", "token"))
    text = Kernels(KernelSpec((part, *plain("ragged", "float16")), 4, 128, 128, 0.125), Form()).text
    shown = re.findall(r"```python\n(.*?)```", page, re.S)
    lines = [line for block in shown for line in block.splitlines() if line]
    assert lines == [line for line in text[text.index("@triton.jit\ndef attend") :].splitlines() if line]
    fragments = re.findall(r"```py\n(.*?)\n```", page, re.S)
    assert len(fragments) == 2
    assert all(fragment in text for fragment in fragments)
