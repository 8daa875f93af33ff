"""A library is opened only if this user wrote it and it is whole; waits for another process end."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcompile.kernels.cpp import build, library

pytestmark = pytest.mark.skipif(build.available() is not None, reason=f"no compiler: {build.available()}")
SOURCE = 'extern "C" int answer() { return 42; }\n'
PLANTED = """
#include <cstdlib>
extern "C" int answer() { return 666; }
__attribute__((constructor)) static void run() { _Exit(66); }
"""
ROOT = os.name == "posix" and os.geteuid() == 0
NOBODY = 65534


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def elsewhere(*paths: Path) -> subprocess.CompletedProcess[str]:
    """What a process that has mapped nothing yet, and may die of it, does with these libraries."""
    code = f"""
from pathlib import Path
from kvcompile.kernels.cpp import library
for path in {[str(path) for path in paths]}:
    found = library.opened(Path(path))
    print(found and found["answer"]())
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def replaced(path: Path, data: bytes) -> None:
    """A mapped library must not be cut: the name is given to another file."""
    fresh = path.with_name("fresh")
    fresh.write_bytes(data)
    fresh.chmod(0o700)
    os.replace(fresh, path)


def planted(folder: Path) -> Path:
    """A library that ends the process that opens it, with the record that belongs to it."""
    stem = folder / "planted"
    source = stem.with_suffix(".cpp")
    source.write_text(PLANTED)
    command = [*build.toolchain().compiler, "-shared", "-fPIC", str(source), "-o", str(stem.with_suffix(".so"))]
    subprocess.run(command, check=True)
    stem.with_suffix(".sha256").write_text(library._facts(stem.with_suffix(".so")))
    return stem.with_suffix(".so")


def test_a_damaged_library_is_not_opened(cache: Path) -> None:
    """Cut off it would be mapped and end the process with SIGBUS."""
    path = Path(build.load(SOURCE, "it")._name)
    data, record = path.read_bytes(), path.with_suffix(".sha256").read_bytes()
    cuts = [data[: int(len(data) * part)] for part in (0.0, 0.01, 0.3, 0.5, 0.6, 0.7, 0.8, 0.99)]
    damaged = [*cuts, data[:-100] + bytes([data[-100] ^ 1]) + data[-99:], b"garbage", data]
    stems = [cache / f"it-{number}" for number in range(len(damaged))]
    for stem, content in zip(stems, damaged, strict=True):
        replaced(stem.with_suffix(".so"), content)
        replaced(stem.with_suffix(".sha256"), record)
    done = elsewhere(*(stem.with_suffix(".so") for stem in stems), path)
    assert done.returncode == 0, done
    assert done.stdout.split() == ["None"] * (len(damaged) - 1) + ["42", "42"]


def test_a_damaged_library_is_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe of the toolchain too."""
    build.load(SOURCE, "it")
    whole = {path: path.read_bytes() for path in cache.glob("*.so")}
    assert {path.name.partition("-")[0] for path in whole} == {"it", "probe"}
    for path, data in whole.items():
        replaced(path, data[: len(data) // 2])
    monkeypatch.setattr(build, "_loaded", {})
    build._toolchain.cache_clear()
    assert build.load(SOURCE, "it")["answer"]() == 42
    assert {path: path.stat().st_size for path in whole} == {path: len(data) for path, data in whole.items()}


def test_library_and_record_are_on_the_disk_before_they_have_their_names(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace = os.replace
    monkeypatch.setattr(library, "sync", lambda path: done.append(f"sync {path.suffix}"))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"name {Path(b).suffix}"), replace(a, b)))
    build.load(SOURCE, "it")
    assert done[-5:] == ["sync .so", "sync .sha256", "name .so", "name .sha256", "sync "]


KINDS = ["link", "written by all", pytest.param("owner", marks=pytest.mark.skipif(not ROOT, reason="needs root"))]


@pytest.mark.parametrize("how", KINDS)
def test_a_library_of_others_is_not_opened(
    how: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its constructor would run: here it would end the process with 66."""
    path = Path(build.load(SOURCE, "it")._name)
    evil = planted(tmp_path)
    for kind in (".so", ".sha256"):
        replaced(path.with_suffix(kind), evil.with_suffix(kind).read_bytes())
    if how == "link":
        path.unlink()
        path.symlink_to(evil)
    elif how == "owner":
        os.chown(path, NOBODY, NOBODY)
    else:
        path.chmod(0o777)
    done = elsewhere(path)
    assert (done.returncode, done.stdout) == (0, "None\n")
    monkeypatch.setattr(build, "_loaded", {})
    build.load(SOURCE, "it")
    assert not path.is_symlink()
    assert path.stat().st_mode & 0o077 == 0
    assert elsewhere(path).stdout == "42\n", "built again"


@pytest.mark.parametrize("how", KINDS)
def test_a_folder_of_others_is_not_used(how: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load(SOURCE, "it")
    if how == "link":
        cache.rename(tmp_path / "theirs")
        cache.symlink_to(tmp_path / "theirs")
    elif how == "owner":
        os.chown(cache, NOBODY, NOBODY)
    else:
        cache.chmod(0o777)
    build._toolchain.cache_clear()
    with pytest.warns(UserWarning, match=f"{cache} belongs to another user, .* Fix: set KVCOMPILE_CACHE=") as told:
        made = Path(build.load(SOURCE, "it")._name)
    assert made.parent != cache
    assert made.parent.stat().st_mode & 0o077 == 0
    assert Path(build.load(SOURCE, "other")._name).parent == made.parent
    assert len(told) == 1


def test_files_are_for_their_user_alone_whatever_the_umask(cache: Path) -> None:
    before = os.umask(0)
    try:
        build.load(SOURCE, "it")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (cache.parent, cache, *cache.iterdir())}
    assert {mode & 0o077 for mode in modes.values()} == {0}, modes


def test_a_lock_that_is_never_released_does_not_stop_us(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held by a process that is stopped, say; building twice is harmless."""
    monkeypatch.setattr(library, "LOCK_SECONDS", 0.2)
    build.load(SOURCE, "it")
    stem = next(cache.glob("it-*.cpp"))
    stem.with_suffix(".so").unlink()
    monkeypatch.setattr(build, "_loaded", {})
    with stem.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match=r"waited 0 s for the process that compiles .*it-.*\.cpp, is it stopped"):
            assert build.load(SOURCE, "it")["answer"]() == 42
