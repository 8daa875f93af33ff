"""AOTInductor packages decode like the compiled model, from Python and from a C++ program without Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from programs import code, compiled, stepped
from tiny import tiny_ids

from kvcompile.exporters.aoti import AOTI

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
NEW = 20
QUICK = {"aot_inductor.debug_compile": True, "aot_inductor.precompile_headers": False}  # -O0: compiled sooner
SNAPKV = {"budget": 12, "window": 8, "decode_every": 4, "skip_layers": "[0,1]"}  # those two keep the same tokens
STACK = ["policy=[mqa,snapkv]", *(f"stack.snapkv.{name}={value}" for name, value in SNAPKV.items())]


@pytest.fixture(scope="module")
def model() -> Any:
    return compiled("llama", STACK, num_hidden_layers=3)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("aoti")
    with torch._inductor.config.patch(QUICK):
        AOTI(prompt=64, new=24).write(model, None, made)
    return made


@pytest.mark.filterwarnings("default")  # torch's own, on loading
def test_python_decodes_alike(model: Any, folder: Path) -> None:
    prefill, decode = (torch._inductor.aoti_load_package(str(folder / f"{x}.pt2")) for x in ("prefill", "decode"))
    usage: dict[str, Any] = {}
    exec(code(AOTI.usage), usage)
    for count in (2, 19, 48):
        ids = tiny_ids(1, count)
        expected, _ = stepped(model, ids, NEW)
        tokens = expected[:, :-1].argmax(-1)
        logits, *cache = prefill(ids)
        # a compiler makes one tensor of two equal ones: entries of such layers would grow once for every layer
        assert len({x.data_ptr() for x in cache}) == len(cache)
        got = [logits, *(decode(token[:, None], *cache) for token in tokens.unbind(1))]
        torch.testing.assert_close(torch.cat(got, 1), expected, atol=2e-4, rtol=1e-4)
    assert torch.equal(torch.cat(list(usage["generate"](folder, ids, NEW)), 1), tokens)


def test_cpp_decodes_alike(model: Any, folder: Path, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    source, program = tmp_path / "step.cpp", tmp_path / "step"
    source.write_text(code(AOTI.usage, "cpp"))
    assert len(source.read_text().splitlines()) < 35
    flags = [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-std=c++20", "-O0"]
    places = [f"-I{p}" for p in include_paths()] + [f"-L{p}" for p in library_paths()]
    places += [f"-Wl,-rpath,{p}" for p in library_paths()]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", *flags, *places, str(source), "-o", str(program), *libraries], check=True)
    ids = tiny_ids(1, 33)
    expected, _ = stepped(model, ids, NEW)
    prompt = [str(x) for x in ids[0].tolist()]
    asked = [str(program), str(folder), str(NEW), *prompt]
    printed = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    assert [int(x) for x in printed.split()] == expected[0, :-1].argmax(-1).tolist()
    room = 64 + 24 - 33
    too_many = subprocess.run([*asked[:2], str(room + 1), *prompt], check=False, capture_output=True, text=True)
    assert too_many.returncode != 0  # no room for the last one
    assert len(too_many.stdout.split()) == room + 1
