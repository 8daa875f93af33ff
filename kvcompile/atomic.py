"""Folders that appear whole: made beside their place, put there in one step, swept away after a kill."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kvcompile.paths import sync

LOCK, REPLACED = ".lock", ".replaced"
YOUNG_SECONDS = 5.0  # an older lock that nobody holds belongs to a process that is gone
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


@contextlib.contextmanager
def making(target: Path, prefix: str) -> Iterator[Path]:
    """A folder beside `target` in which to make what `publish` puts there; it is gone afterwards.

    What processes of this machine that were killed have left under `prefix` goes first. Raises OSError.
    """
    _sweep(target.parent, prefix)
    with (
        tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix, ignore_cleanup_errors=True) as scratch,
        Path(scratch, LOCK).open("w", encoding="utf-8") as lock,
    ):
        lock.write(f"{platform.node()}\n{target.name}")
        lock.flush()
        with contextlib.suppress(ImportError, OSError):  # without locks nothing is ever swept
            _lock(lock.fileno())
        yield Path(scratch)


def publish(new: Path, target: Path) -> None:
    """Give a finished folder, made in `making`, the name `target`; what had the name before goes with the rest.

    One step on Linux: `target` is the old folder or the new one, whenever the process is killed. Where the system or
    the file system cannot exchange two names there are two, and after a kill between them the next `making` beside it
    puts the old one back. Raises OSError, with the old one in its place.
    """
    try:
        new.rename(target)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        if not _exchanged(new, target):
            _replaced(new, target)
    sync(target.parent)


def _replaced(new: Path, target: Path) -> None:
    old = new.with_name(REPLACED)
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names; False where that cannot be done here. Raises OSError where it fails."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sweep(parent: Path, prefix: str) -> None:
    for scratch in parent.glob(f"{prefix}*"):
        with contextlib.suppress(ImportError, OSError, ValueError):  # its process lives, or it is not ours to remove
            _remove_stale(scratch)


def _remove_stale(scratch: Path) -> None:
    """Remove the folder of a `making` that was killed; what it had moved out of its place goes back there."""
    if scratch.is_symlink() or time.time() - (scratch / LOCK).stat().st_mtime < YOUNG_SECONDS:
        return
    with (scratch / LOCK).open("r+", encoding="utf-8") as lock:
        _lock(lock.fileno())
        machine, _, name = lock.read().partition("\n")
        if machine != platform.node():  # not every network folder shares its locks
            return
        old, target = scratch / REPLACED, scratch.parent / Path(name).name
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)


def _lock(handle: int) -> None:
    """Lock a file until it is closed. Raises OSError where another has, ImportError where there are no locks."""
    import fcntl

    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
