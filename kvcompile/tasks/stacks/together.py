"""Several recipes on one model: a prompt is read once, and each goes on over a copy of what was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.resources import files
from typing import TYPE_CHECKING

from kvcompile.analysis.compare.contest import Contest, room
from kvcompile.analysis.compare.entry import FULL, Entry
from kvcompile.errors import KvcompileError, first_line
from kvcompile.evaluation.heldout import longest_of
from kvcompile.progress import Progress, silent
from kvcompile.tasks.ask import Respondent, respondent
from kvcompile.tasks.base import Sample
from kvcompile.tasks.stacks.subject import Checkpoint, Stack, Subject

if TYPE_CHECKING:
    from kvcompile.config.schema import Config

ALL = "all"


@dataclass
class Together:
    """Recipes on a checkpoint, one at work at a time; those that leave its weights alone share what was read.

    kernels, memory: as in a config. tokens: of the longest context.
    """

    checkpoint: Checkpoint
    kernels: str
    memory: float | None
    progress: Progress = silent
    tokens: int = 1
    _at_work: Entry | None = field(default=None, init=False)

    def stack(self, entry: Entry) -> Stack:
        """A recipe on the checkpoint. Raises KvcompileError where it cannot be, before weights are read."""
        return replace(self.checkpoint.stack(entry.config(self.kernels)), open=partial(self._open, entry))

    def expect(self, samples: Sequence[Sample]) -> None:
        """Know what will be read, so that as much of it stays as memory holds."""
        self.tokens = max(self.tokens, *(len(sample.context) for sample in samples))

    @cached_property
    def _contest(self) -> Contest:
        c = self.checkpoint
        held = room(c.architecture, c.dtype, self.tokens, self.memory)
        return Contest(c.loaded, c.tokenizer, self.kernels, self.progress, held)

    def _open(self, entry: Entry) -> tuple[Respondent, str]:
        weights = self.checkpoint.weights
        if self._at_work is not None and self._at_work != entry:
            self._contest.forget(self._at_work)  # weights of its own are as large as the model
        self._at_work = entry
        return respondent(self._contest.runner(entry), self.checkpoint.tokenizer), weights


def of_recipes(config: Config, progress: Progress = silent) -> Subject:
    """What `evaluate.recipes` names, each once; with the uncompressed model before them.

    Raises KvcompileError for a recipe that cannot be on this model; of `all` such ones are left out, and notes say why.
    """
    checkpoint = Checkpoint(config.model, progress)
    together = Together(checkpoint, config.kernels, config.evaluate.memory, progress)
    every = list(config.evaluate.recipes) == [ALL]
    entries = _shipped() if every else [Entry(name) for name in config.evaluate.recipes]
    if config.evaluate.baseline:
        entries.insert(0, Entry(FULL))
    stacks: dict[str, Stack] = {}
    notes = []
    for entry in entries:
        try:
            stack = together.stack(entry)
        except KvcompileError as error:
            if not every:
                raise
            notes.append(f"left out: {entry.text}: {first_line(error)}")
        else:
            stacks.setdefault(stack.name, stack)
    longest = longest_of(checkpoint.architecture)
    return Subject(checkpoint.tokenizer, longest, tuple(stacks.values()), tuple(notes), together.expect)


def _shipped() -> list[Entry]:
    """Every recipe that comes with kvcompile and trains nothing."""
    folder = files("kvcompile.recipes").joinpath("recipe")
    entries = [Entry(file.name.removesuffix(".yaml")) for file in folder.iterdir()]
    return sorted((e for e in entries if not e.config().heal.tokens), key=lambda e: e.text)
