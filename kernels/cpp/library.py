"""A compiled library on disk: opened only if this user wrote it and it is as it was written."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from kvcompile.paths import ours, sync

LOCK_SECONDS = 120.0  # waited for another process that builds the same
PAUSE = 0.05


def opened(library: Path) -> ctypes.CDLL | None:
    """The library, None where there is none that is ours, whole and made for this system.

    It is compared with the size and hash beside it first: one that was cut off would be mapped, and kill the process.
    """
    try:
        return ctypes.CDLL(str(library)) if whole(library) else None
    except OSError:
        return None


def whole(built: Path) -> bool:
    """Whether a file that a compiler wrote is there, is ours, and is as it was published."""
    record = _record(built)
    try:
        return ours(built) and ours(record) and record.read_text("ascii") == _facts(built)
    except (OSError, ValueError):
        return False


def publish(built: Path, library: Path) -> None:
    """Give a finished library (or header) and its record their names, both whole on the disk by then."""
    record = _record(built)
    record.write_text(_facts(built), "ascii")
    built.chmod(0o700)
    record.chmod(0o600)
    sync(built)
    sync(record)
    os.replace(built, library)
    os.replace(record, _record(library))
    sync(library.parent)


@contextlib.contextmanager
def alone(path: Path, doing: str = "compiles") -> Iterator[None]:
    """Hold the lock of a file, which is made where it is missing.

    Without locks (some network folders), or where another process holds it for `LOCK_SECONDS`, two may build the same,
    which is harmless. doing: what such a process does, for a warning.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        with contextlib.suppress(ImportError, OSError):
            if not _locked(handle):
                warnings.warn(
                    f"waited {LOCK_SECONDS:.0f} s for the process that {doing} {path}, is it stopped? This one "
                    f"{doing} it as well",
                    stacklevel=4,
                )
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    """Whether the lock could be had in time. Raises OSError on a file system without locks."""
    import fcntl

    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
        time.sleep(PAUSE)


def _record(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _facts(library: Path) -> str:
    data = library.read_bytes()
    return f"{len(data)} {hashlib.sha256(data).hexdigest()}\n"
