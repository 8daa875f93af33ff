"""Where kvcompile keeps things: absolute, and for what is executed a folder of this user alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcompile import paths
from kvcompile.errors import KvcompileError


@pytest.mark.parametrize("name", ["KVCOMPILE_CACHE", "XDG_CACHE_HOME"])
def test_a_relative_cache_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run a library out of whatever the current folder is."""
    monkeypatch.delenv("KVCOMPILE_CACHE", raising=False)
    monkeypatch.setenv(name, "here")
    with pytest.raises(KvcompileError, match=r"must be an absolute path, got here.* Fix: set KVCOMPILE_CACHE="):
        paths.private_folder("kernels")
    monkeypatch.setenv(name, "~/here")
    assert paths.cache_folder().is_absolute()


def test_a_folder_that_anybody_may_replace_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sticky one, as /tmp, nobody else may: there the folder itself says whose it is."""
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path))
    tmp_path.chmod(0o1777)
    assert paths.private_folder("kernels") == tmp_path / "kernels"
    tmp_path.chmod(0o777)
    with pytest.warns(UserWarning, match="can be written by others") as told:
        instead = paths.private_folder("kernels")
    assert instead.stat().st_mode & 0o077 == 0
    assert paths.private_folder("kernels") == instead, "one for the process, told once"
    assert len(told) == 1


def test_the_folder_used_instead_is_gone_with_its_process(tmp_path: Path) -> None:
    """Not with a process that was forked from it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    code = """
import os, sys
from kvcompile.paths import private_folder
made = private_folder("kernels")
if os.fork() == 0:
    sys.exit()
os.wait()
print(made.is_dir(), made)
"""
    command, environment = (
        [sys.executable, "-W", "ignore", "-c", code],
        {**os.environ, "KVCOMPILE_CACHE": str(tmp_path)},
    )
    there, made = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    assert there == "True"
    assert not Path(made).exists()


def test_others_cannot_come_between_looking_and_making(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    with pytest.raises(PermissionError, match="others can write to it"):
        paths.make_private(tmp_path / "kernels")


def test_folders_are_made_for_their_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        paths.make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "a" / "b")} == {0o700}
