"""Verdicts on disk, one small file each: what cannot be read, or was written for something else, is checked again.

A file is marked before its check begins. Where the mark is found and its process is gone, the check ended it: a kernel
that takes the process along is tried once.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from kvcompile.kernels.cpp.library import alone
from kvcompile.kernels.selfcheck.identity import digest
from kvcompile.kernels.selfcheck.verdict import Verdict
from kvcompile.paths import make_private, ours, private_folder

FOLDER = "checks"
ENDED = "the process that checked it first ended before the check did: it crashed, or was killed"


def folder() -> Path:
    """Where verdicts and bug reports lie: nobody else can write there."""
    return private_folder(FOLDER)


def stem(facts: dict[str, str]) -> Path:
    """The path of a verdict's files, without their ending."""
    return folder() / f"{facts['backend']}-{digest(facts)}"


def remembered(facts: dict[str, str], check: Callable[[], Verdict], again: bool = False) -> Verdict:
    """The verdict for an identity: from disk, or by a check whose verdict is left there.

    Processes may ask for the same at once: one of them checks, the others wait.

    Args:
        facts: the identity.
        check: what finds the verdict.
        again: check also where a verdict is on disk.
    """
    path = stem(facts).with_suffix(".json")
    try:
        make_private(path.parent)
        with alone(path.with_suffix(".lock"), "checks"):
            return _remembered(path, facts, check, again)
    except OSError as error:
        warnings.warn(
            f"verdicts on kernels cannot be kept in {path.parent} ({error}): each process checks", stacklevel=2
        )
        return check()


def _remembered(path: Path, facts: dict[str, str], check: Callable[[], Verdict], again: bool) -> Verdict:
    """The same, with the lock in hand."""
    written = None if again else _read(path, facts)
    if written is not None:
        if "verdict" in written and (verdict := _verdict(written["verdict"])) is not None:
            return verdict
        if _gone(written.get("process"), written.get("machine")):
            verdict = Verdict(ENDED)
            _write(path, {"identity": facts, "verdict": asdict(verdict)})
            return verdict
    _write(path, {"identity": facts, "process": os.getpid(), "machine": platform.node()})
    try:
        verdict = check()
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    _write(path, {"identity": facts, "verdict": asdict(verdict)})
    return verdict


def _read(path: Path, facts: dict[str, str]) -> dict[str, Any] | None:
    """What a file says, None unless it is whole, this user's, and of this identity."""
    try:
        written = json.loads(path.read_text("utf-8")) if ours(path) else None
    except (OSError, ValueError, RecursionError):
        return None
    return written if isinstance(written, dict) and written.get("identity") == facts else None


def _verdict(written: Any) -> Verdict | None:
    """A verdict as it was written; None for anything else."""
    names = {f.name: type(f.default) for f in fields(Verdict)}
    if not isinstance(written, dict) or {k: type(x) for k, x in written.items()} != names:
        return None
    return Verdict(**written)


def _write(path: Path, content: dict[str, Any]) -> None:
    """In one step: a reader sees the old file or the new one."""
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    scratch.chmod(0o600)
    os.replace(scratch, path)


def _gone(process: Any, machine: Any) -> bool:
    """Whether the process of a mark has ended, as far as that can be told from here."""
    if not isinstance(process, int) or machine != platform.node() or os.name != "posix":
        return False
    if process == os.getpid():  # the number was given out again, or a thread is at it without locks
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
