"""A folder is the old one or the new one, whenever its process is killed; what was half made does not stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvcompile import atomic

PUBLISH = """
import os, signal, sys
from pathlib import Path
from kvcompile import atomic

rename, target = Path.rename, Path(sys.argv[1])

def killed_after(path, to):
    rename(path, to)
    os.kill(os.getpid(), signal.SIGKILL)

with atomic.making(target, ".saving-") as scratch:
    (scratch / "new").mkdir()
    (scratch / "new" / "file").write_text("new")
    if "one by one" in sys.argv:
        atomic._exchanged = lambda one, other: False
    Path.rename = killed_after
    atomic.publish(scratch / "new", target)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="names are exchanged on Linux")


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(atomic, "YOUNG_SECONDS", 0.0)
    return written(tmp_path / "target", "old")


def written(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


def published(target: Path, *how: str) -> int:
    return subprocess.run([sys.executable, "-c", PUBLISH, str(target), *how], check=False).returncode


@linux
def test_there_is_no_moment_between_the_old_and_the_new(target: Path) -> None:
    """The process kills itself after the first name that it moves: it moves none, it exchanges two."""
    assert published(target) == 0
    assert (target / "file").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@linux
def test_a_kill_between_two_renames_is_made_good_by_the_next(target: Path) -> None:
    """Where names cannot be exchanged, as on NFS."""
    assert published(target, "one by one") == -9
    assert not target.exists()
    with atomic.making(target.parent / "other", ".saving-") as scratch:
        assert (target / "file").read_text() == "old"
        assert set(target.parent.iterdir()) == {target, scratch}


def test_the_first_needs_nothing_to_exchange(tmp_path: Path) -> None:
    with atomic.making(tmp_path / "target", ".saving-") as scratch:
        atomic.publish(written(scratch / "new", "first"), tmp_path / "target")
    assert [(path.name, path.is_dir()) for path in tmp_path.iterdir()] == [("target", True)]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "one by one"])
def test_what_was_there_is_replaced_as_a_whole(exchange: bool, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (target / "more").touch()
    if not exchange:
        monkeypatch.setattr(atomic, "_exchanged", lambda one, other: False)
    with atomic.making(target, ".saving-") as scratch:
        atomic.publish(written(scratch / "new", "new"), target)
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert {path.name: path.read_text() for path in target.iterdir()} == {"file": "new"}


def test_work_of_others_is_not_swept(target: Path) -> None:
    """A process that lives holds its lock; a folder without a lock is not ours, nor is one of another machine."""
    foreign = written(target.parent / ".saving-foreign", "theirs")
    far = written(target.parent / ".saving-far", "theirs")
    (far / atomic.LOCK).write_text("another machine\ntarget")
    with atomic.making(target, ".saving-") as first, atomic.making(target, ".saving-") as second:
        assert set(target.parent.iterdir()) == {target, foreign, far, first, second}
