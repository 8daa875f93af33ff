"""The folder of a training's checkpoints: whose they are, and which one is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan

if TYPE_CHECKING:
    from kvcompile.config.schema import Config


MARK = "heal.json"
FREE = ("tokens", "minutes", "checkpoint_minutes", "resume")  # may differ between the sessions of one training


def fingerprint(config: Config, plan: Plan) -> str:
    """What a checkpoint must agree in to be resumed: the model, what became of it, and how it is trained."""
    heal = {k: v for k, v in dataclasses.asdict(config.heal).items() if k not in FREE}
    facts = {"heal": heal, "model": dataclasses.asdict(config.model), "plan": plan.digest()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextmanager
def opened(folder: Path | None) -> Iterator[Path]:
    """A folder for checkpoints, a passing one for None; whose they are says `claim`, once training can begin.

    What fails before its first checkpoint leaves nothing behind.
    Raises KvcompileError where the given one holds something else than checkpoints.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="kvcompile-heal-", ignore_cleanup_errors=True) as passing:
            yield Path(passing)
        return
    main = not dist.is_initialized() or dist.get_rank() == 0
    created = [place for place in (folder, *folder.parents) if main and not place.exists()]
    if main:
        _prepare(folder)
    if dist.is_initialized():
        dist.barrier()
    try:
        yield folder
    except BaseException:
        if main:
            _clear(folder, created)
        raise


def _clear(folder: Path, created: list[Path]) -> None:
    """Take back the mark, where it stands alone, and the folders `made` for it."""
    if [path.name for path in folder.iterdir()] not in ([], [MARK]):
        return
    (folder / MARK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another has put something there meanwhile
        for place in created:
            place.rmdir()


def _prepare(folder: Path) -> None:
    if folder.exists() and not (folder / MARK).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise KvcompileError("checkpoints need a folder of their own", f"{folder}: other files", "output=<elsewhere>")
    folder.mkdir(parents=True, exist_ok=True)


def claim(folder: Path, owner: str) -> None:
    """The folder is this `owner`'s from here on; checkpoints of another are deleted."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        mark = folder / MARK
        if mark.is_file() and _owner(mark) != owner:
            shutil.rmtree(folder)
            folder.mkdir()
        mark.write_text(json.dumps({"fingerprint": owner}) + "\n", encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()


def newest(folder: Path) -> str | None:
    """The newest whole checkpoint: its state is the last file that is written."""
    whole = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None


def _owner(mark: Path) -> str | None:
    try:
        return str(json.loads(mark.read_text(encoding="utf-8"))["fingerprint"])
    except (ValueError, KeyError, TypeError):
        return None
