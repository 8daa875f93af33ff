"""Where kvcompile keeps what it need not make twice, and who may write there."""

from __future__ import annotations

import atexit
import errno
import functools
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import warnings
from pathlib import Path

from kvcompile.errors import KvcompileError
from kvcompile.progress import Progress, silent

SHOWN = 120  # characters of a path in an error
BESIDE = ".saving-12345678"  # a folder is made in one like this

_lock = threading.Lock()
_instead: dict[Path, Path] = {}


def cache_folder() -> Path:
    """$KVCOMPILE_CACHE, else kvcompile/ in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache).

    Raises KvcompileError for a relative path: what is run from there must not depend on the current folder.
    """
    folder = os.environ.get("KVCOMPILE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "kvcompile")
    path = Path(os.path.expanduser(folder))
    if not path.is_absolute():
        raise KvcompileError(
            "the cache folder ($KVCOMPILE_CACHE, else kvcompile in $XDG_CACHE_HOME) must be an absolute path",
            path,
            "set KVCOMPILE_CACHE=<absolute path>",
        )
    return path


def private_folder(name: str) -> Path:
    """The folder `name` of the cache, for files that are executed; `make_private` makes it.

    Where others could have put something there, it is a temporary folder of this process, and a warning says so.
    """
    folder = cache_folder() / name
    try:
        trusted = ours(folder)
    except OSError:  # not made yet; what cannot be read says so when it is written to
        trusted = True
    if trusted and not _replaceable(folder):
        return folder
    with _lock:
        if folder not in _instead:
            _instead[folder] = _temporary(folder)
        return _instead[folder]


def ours(path: Path) -> bool:
    """Whether a file or folder belongs to this user or to root, is no link, and can be written by nobody else.

    Raises OSError where there is none.
    """
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode):
        return False
    return os.name != "posix" or (facts.st_uid in (0, os.geteuid()) and not facts.st_mode & 0o022)


def make_folder(folder: Path) -> None:
    """Make a folder and what is missing above it for this user alone, whatever the umask."""
    for path in (*reversed(folder.parents), folder):
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)


def make_private(folder: Path) -> None:
    """Make a folder for files that are executed. Raises PermissionError for one that others can write to."""
    make_folder(folder)
    if not ours(folder):
        raise PermissionError(errno.EPERM, "others can write to it", str(folder))


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before anything relies on it."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_here() -> None:
    """Raise KvcompileError where the current folder was deleted: no relative path can be found from there."""
    try:
        os.getcwd()
    except OSError as error:
        raise KvcompileError("the current folder must exist", "one that was deleted", "cd to another") from error


def require_short(folder: Path) -> None:
    """Raise KvcompileError for a folder whose name, or the names of files below and beside it, would be too long."""
    for path in (folder.parent / f"{folder.name}-failed", folder.parent / BESIDE / "made" / ("x" * 64)):
        try:
            os.lstat(path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise KvcompileError(
                    "the path of an output must be one that the system takes",
                    f"{len(str(folder))} characters, {shortened(folder)}",
                    "output=<a shorter one>",
                ) from error


def shortened(path: object) -> str:
    """A path for one line."""
    text = str(path)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}...{text[-SHOWN // 2 :]}"


def _replaceable(folder: Path) -> bool:
    """Whether anybody may rename the folder and put another in its place."""
    try:
        mode = folder.parent.stat().st_mode
    except OSError:
        return False
    return os.name == "posix" and bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _temporary(folder: Path) -> Path:
    private, process = Path(tempfile.mkdtemp(prefix="kvcompile-")), os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # a fork leaves it to its parent
            shutil.rmtree(private, ignore_errors=True)

    atexit.register(remove)
    warnings.warn(
        f"{folder} belongs to another user, can be written by others or is a link, so nothing is run from it: kernels "
        f"are compiled anew into {private}. Fix: set KVCOMPILE_CACHE=<a folder that only you can write to>",
        stacklevel=2,
    )
    return private


def sha256(path: Path, progress: Progress = silent) -> str:
    """SHA-256 of a file, read in pieces."""
    digest, total = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for piece in iter(functools.partial(file.read, 1 << 22), b""):
            digest.update(piece)
            progress(f"checking {path.name}", file.tell(), total)
    return digest.hexdigest()
