"""The vectors are parsed once for all kernels; a compiler that cannot keep what it parsed compiles each text whole."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from kvcompile.errors import KvcompileError
from kvcompile.kernels.cpp import build, library, simd

GCC = build.available() is None and "__clang__" not in build.toolchain().macros
pytestmark = pytest.mark.skipif(not GCC, reason="headers are parsed ahead by GCC alone")
LENGTH = simd.prelude().count("\n")
MARKS = {" c++-header ": "header", " -include ": "kernel", " -c ": "whole kernel"}


def text(number: int) -> str:
    return f'{simd.prelude()}extern "C" int answer() {{ return (int)sum(set({number}.0f)) / 16; }}\n'


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiler that writes its arguments into $LOG, a line a call, and fails where one of them is $WRONG."""
    path = tmp_path_factory.mktemp("compiler") / "c++"
    wrong = 'case " $* " in *" ${WRONG:-nothing} "*) exit 1;; esac'
    path.write_text(f'#!/bin/sh\necho " $* " >> "$LOG"\n{wrong}\nexec "{build.toolchain().compiler[0]}" "$@"\n')
    path.chmod(0o700)
    return path


@pytest.fixture
def empty(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own, and a process that knows nothing of its headers."""
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr(build, "_headers", {})
    return tmp_path / "cache" / "kernels"


@pytest.fixture(scope="module")
def parsed(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the header is: to parse it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("parsed")
        patch.setenv("KVCOMPILE_CACHE", str(home / "cache"))
        patch.setenv("CXX", str(script))
        patch.setenv("LOG", str(home / "log"))
        patch.setattr(build, "_headers", {})
        build.load(text(1), "first")
    return home


@pytest.fixture
def cache(parsed: Path, empty: Path) -> Path:
    """A copy of it."""
    empty.mkdir(parents=True, mode=0o700)
    for path in (parsed / "cache/kernels").glob("vectors-*"):
        shutil.copy2(path, empty)
    return empty


def calls(log: Path) -> list[str]:
    """What was done for the vectors and for kernels, probe and links left out."""
    lines = [line for line in log.read_text().splitlines() if "/probe-" not in line]
    return [
        next(MARKS[mark] for mark in MARKS if mark in line) for line in lines if any(mark in line for mark in MARKS)
    ]


def header(cache: Path) -> Path:
    (kept,) = cache.glob("vectors-*.gch")
    return kept


def test_the_vectors_are_parsed_once(parsed: Path, cache: Path, tmp_path: Path) -> None:
    kept = header(parsed / "cache/kernels")
    assert kept.with_suffix("").read_text() == simd.header()
    assert library.whole(kept)
    assert stat.S_IMODE(kept.stat().st_mode) & 0o077 == 0
    assert calls(parsed / "log") == ["header", "kernel"]
    assert [build.load(text(n), "it")["answer"]() for n in (3, 4)] == [3, 4]  # as another process
    assert calls(tmp_path / "log") == ["kernel"] * 2
    assert build.load('extern "C" int answer() { return 7; }\n', "it")["answer"]() == 7
    assert calls(tmp_path / "log")[2:] == ["whole kernel"], "it has no vectors"


def test_other_flags_have_another_header(cache: Path, tmp_path: Path) -> None:
    """GCC would not take this one."""
    assert build.load(text(6), "it", ("-O1",))["answer"]() == 6
    assert calls(tmp_path / "log") == ["header", "kernel"]


def test_a_library_is_the_same_to_the_byte(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the text that is kept is the whole one."""
    path = Path(build.load(text(3), "it")._name)
    built = path.read_bytes()
    assert path.with_suffix(".cpp").read_text() == text(3)
    path.unlink()
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_header", lambda *_: None)
    build.load(text(3), "it")
    assert path.read_bytes() == built


def test_a_compiler_that_takes_no_header_compiles_texts_whole(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRONG", "-include")
    assert [build.load(text(n), "it")["answer"]() for n in (3, 4)] == [3, 4]
    assert calls(tmp_path / "log") == ["kernel", "whole kernel", "whole kernel"]


def test_a_compiler_that_makes_no_header_compiles_texts_whole(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRONG", "c++-header")
    assert [build.load(text(n), "it")["answer"]() for n in (3, 4)] == [3, 4]
    assert calls(tmp_path / "log") == ["header", "whole kernel", "whole kernel"]
    assert not list(empty.glob("*.gch"))


def test_a_header_that_the_compiler_passes_over_is_an_error(cache: Path) -> None:
    """Not parsed in silence, for each kernel anew."""
    tools, kept = build.toolchain(), header(cache)
    command = [*tools.compiler, "-include", str(kept.with_suffix("")), *build.REFUSED, "-fsyntax-only", "-x", "c++"]
    done = subprocess.run([*command, os.devnull], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "invalid-pch" in done.stderr


def test_a_header_of_others_is_not_used(cache: Path, tmp_path: Path) -> None:
    kept = header(cache)
    kept.chmod(0o777)
    assert not library.whole(kept)
    kept.rename(tmp_path / "theirs")
    kept.symlink_to(tmp_path / "theirs")
    assert not library.whole(kept)
    kept.unlink()
    kept.write_bytes((tmp_path / "theirs").read_bytes()[:1000])
    assert build.load(text(4), "it")["answer"]() == 4
    assert calls(tmp_path / "log") == ["header", "kernel"], "parsed again"
    assert library.whole(kept)


def test_an_error_names_the_line_of_the_text(cache: Path) -> None:
    with pytest.raises(KvcompileError, match=rf"it-\w+\.cpp:{LENGTH + 2}:.*error.*Fix: set kernels=sdpa"):
        build.load(f"{simd.prelude()}int fine();\nint nonsense(\n", "it")
    assert all(build._headers.values()), "the header is not to blame"
