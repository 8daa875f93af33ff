"""Who is at work on a row: of several processes that share a folder, on one machine or many, one measures it."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

BEAT_SECONDS, PATIENCE_SECONDS = 10.0, 60.0


class Claims:
    """Files `.<key>.claim` in a folder, each with the process that holds it, which touches it while it lives.

    A claim is stale where its process is gone (on this machine), or where nobody has touched it for `patience` seconds
    while this process looked on: no clock of another machine is believed. Whoever wants the row then takes it over.
    """

    def __init__(self, folder: Path, beat: float = BEAT_SECONDS, patience: float = PATIENCE_SECONDS) -> None:
        self.folder, self.beat, self.patience = folder, beat, patience
        self._watched: dict[Path, tuple[object, float]] = {}  # what a claim looked like, and since when it does

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether the row of a key is ours to measure; it is until this ends. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f".{key}.claim"
        token = json.dumps({"host": platform.node(), "pid": os.getpid(), "token": uuid.uuid4().hex})
        if not (_create(path, token) or (self._remove_stale(path) and _create(path, token))):
            yield False
            return
        done = threading.Event()
        heart = threading.Thread(target=_touch, args=(path, self.beat, done), daemon=True)
        heart.start()
        try:
            yield True
        finally:
            done.set()
            heart.join()
            if _read(path) == token:  # else it was taken for stale, and is another's now
                path.unlink(missing_ok=True)

    def _remove_stale(self, path: Path) -> bool:
        """Whether the claim was stale and is gone."""
        text = _read(path)
        if text is None:
            return True
        if not self._stale(path, text):
            return False
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return False  # another process was faster
        stale = _read(aside) == text
        if not stale:  # another process had taken it over in between: it goes back
            with suppress(OSError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)
        return stale

    def _stale(self, path: Path, text: str) -> bool:
        try:
            owner = json.loads(text)
            if owner["host"] == platform.node() and not psutil.pid_exists(int(owner["pid"])):
                return True
        except (ValueError, KeyError, TypeError):
            pass  # torn: nobody touches it
        try:
            looks = (text, path.stat().st_mtime_ns)
        except FileNotFoundError:
            return False
        now = time.monotonic()
        before, since = self._watched.setdefault(path, (looks, now))
        if looks != before:
            self._watched[path] = looks, now
            return False
        return now - since > self.patience


def _create(path: Path, text: str) -> bool:
    """Make a file that appears whole, unless there is one."""
    whole = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    whole.write_text(text, encoding="utf-8")
    try:
        os.link(whole, path)
    except FileExistsError:
        return False
    finally:
        whole.unlink()
    return True


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None


def _touch(path: Path, beat: float, done: threading.Event) -> None:
    while not done.wait(beat):
        with suppress(OSError):
            os.utime(path)
