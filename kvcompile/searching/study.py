"""One study of Optuna, shared by any number of processes: what was tried, and what to try next."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError
from kvcompile.searching.stack import Stack
from kvcompile.searching.wish import Score

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.journal"
SILENT = 900.0  # seconds without a sign of life after which a worker elsewhere counts as gone
STARTUP = 16  # trials that are drawn at random before a model of the others is made
WORKER, ALIVE, STACK, SHARE, SCORES, ERROR, SETTINGS = "worker", "alive", "stack", "share", "scores", "error", "search"


@dataclass(frozen=True)
class Tried:
    """A stack of the study. share: of the bytes. scores: one for each rung that it has climbed. done: told."""

    number: int
    stack: Stack
    share: float
    scores: tuple[Score, ...]
    done: bool


class Study:
    """What all workers of a search share.

    Args:
        name: of the study within its storage.
        storage: a database URL (None: a journal file in `folder`).
        folder: of the output.
        aims: how many numbers are made small.
        settings: what all stacks of the study have in common; others are refused.
        seed: of the first worker; each later one draws otherwise.

    Raises:
        KvcompileError: where Optuna is not installed, the storage cannot be opened, or holds other settings.
    """

    def __init__(
        self, name: str, storage: str | None, folder: Path, aims: int, settings: Mapping[str, Any], seed: int
    ) -> None:
        optuna = _optuna()
        self.worker = f"{socket.gethostname()} {os.getpid()} {_started(os.getpid())}"
        with _quiet():
            opened = _storage(storage, folder)
            try:
                self.study = optuna.create_study(storage=opened, study_name=name, directions=["minimize"] * aims)
                self.study.set_user_attr(SETTINGS, dict(settings))
                self.new = True
            except optuna.exceptions.DuplicatedStudyError:
                self.study = optuna.load_study(storage=opened, study_name=name)
                self.new = False
            self._require_same(name, settings)
            workers = sum(key.startswith(WORKER) for key in self.study.user_attrs)
            self.study.set_user_attr(f"{WORKER} {self.worker}", time.time())
            self.study.sampler = optuna.samplers.TPESampler(
                seed=seed * 1009 + workers, multivariate=True, group=True, n_startup_trials=STARTUP
            )

    def _require_same(self, name: str, settings: Mapping[str, Any]) -> None:
        theirs, mine = self.study.user_attrs.get(SETTINGS), dict(settings)
        if theirs is None:  # its maker has not come so far yet
            time.sleep(1)
            theirs = self.study.user_attrs.get(SETTINGS) or mine
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise KvcompileError(
                    f"study {name!r} holds stacks of another search: {key} was {theirs.get(key)!r} there",
                    f"{value!r}",
                    "search.study=<a new name>, or output=<elsewhere>",
                )

    def begin(self, parameters: Sequence[Mapping[str, Any]]) -> None:
        """What is tried before anything is drawn; only the process that made the study says so."""
        for each in parameters if self.new else ():
            self.study.enqueue_trial(dict(each))

    def ask(self) -> optuna.Trial:
        """The next trial."""
        with _quiet():
            trial = self.study.ask()
        trial.set_user_attr(WORKER, self.worker)
        return trial

    def take(self, trial: optuna.Trial, stack: Stack, share: float) -> None:
        """Say what a trial is about."""
        trial.set_user_attr(SHARE, share)
        # last: another process takes a trial for described once it sees the stack
        trial.set_user_attr(STACK, {name: dict(fields) for name, fields in stack.options.items()})
        self.alive(trial)

    def alive(self, trial: optuna.Trial) -> None:
        """A sign of life."""
        trial.set_user_attr(ALIVE, time.time())

    def climbed(self, trial: optuna.Trial, scores: Sequence[Score]) -> None:
        """Keep the scores of a trial, one for each rung."""
        trial.set_user_attr(SCORES, [each.plain() for each in scores])

    def tell(self, trial: optuna.Trial, values: Sequence[float], constraints: Mapping[str, float]) -> None:
        """End a trial that was measured."""
        with _quiet():
            for name, value in constraints.items():
                trial.set_constraint(name, value)
            self.study.tell(trial, list(values))

    def refuse(self, trial: optuna.Trial, why: str, miss: float, reason: str) -> None:
        """End a trial that cannot be. miss: by how much, more than 0."""
        trial.set_user_attr(ERROR, reason)
        with _quiet():
            trial.set_constraint(why, miss)
            self.study.tell(trial, state=_optuna().trial.TrialState.PRUNED)

    def drop(self, trial: optuna.Trial, again: bool) -> None:
        """End a trial of which nothing is known. again: it is asked about by whoever comes next."""
        state = _optuna().trial.TrialState.FAIL
        with _quiet():
            self.study.tell(trial, state=state)
            if again:
                self.study.enqueue_trial(dict(trial.params))

    def rescue(self) -> int:
        """Give the trials of workers that are gone to whoever comes next; what they measured is not lost."""
        optuna = _optuna()
        count = 0
        for trial in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if not self._gone(trial):
                continue
            try:
                with _quiet():
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                    if trial.params:
                        self.study.enqueue_trial(dict(trial.params))
            except (ValueError, RuntimeError):  # another worker was faster
                continue
            count += 1
        return count

    def _gone(self, trial: optuna.trial.FrozenTrial) -> bool:
        host, _, process = str(trial.user_attrs.get(WORKER, "")).partition(" ")
        if host == socket.gethostname():
            pid, _, started = process.partition(" ")
            return _started(int(pid)) != started
        begun = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        return time.time() - float(trial.user_attrs.get(ALIVE, begun)) > SILENT

    def tried(self) -> list[Tried]:
        """All stacks that could be, in the order in which they came."""
        return list(self._tried())

    def _tried(self) -> Iterator[Tried]:
        states = _optuna().trial.TrialState
        for trial in self.study.get_trials(deepcopy=False, states=(states.COMPLETE, states.RUNNING)):
            known = trial.user_attrs
            if STACK in known:
                scores = tuple(Score(**each) for each in known.get(SCORES, ()))
                done = trial.state == states.COMPLETE
                yield Tried(trial.number, Stack(known[STACK]), float(known[SHARE]), scores, done)

    def refused(self) -> int:
        """How many could not be."""
        return len(self.study.get_trials(deepcopy=False, states=(_optuna().trial.TrialState.PRUNED,)))

    def reason(self) -> str | None:
        """Why the last one could not be."""
        refused = self.study.get_trials(deepcopy=False, states=(_optuna().trial.TrialState.PRUNED,))
        return str(refused[-1].user_attrs.get(ERROR)) if refused else None


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise KvcompileError("a search needs Optuna 5", "none installed", "pip install 'kvcompile[search]'") from error
    return optuna


def _storage(url: str | None, folder: Path) -> Any:
    optuna = _optuna()
    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
        return optuna.storages.JournalStorage(backend)
    try:
        return optuna.storages.RDBStorage(url)
    except Exception as error:  # whatever a database driver raises
        fix = "sqlite:///study.db, or a database that this machine reaches, its driver installed"
        raise KvcompileError("search.storage must be the URL of a database", url, fix) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's log and the warnings about what it calls experimental."""
    logging = _optuna().logging
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", _optuna().exceptions.ExperimentalWarning)
        try:
            yield
        finally:
            logging.set_verbosity(level)


def _started(pid: int) -> str:
    """When a process began; empty where there is none."""
    import psutil

    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return ""
