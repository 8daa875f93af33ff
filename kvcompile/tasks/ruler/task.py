"""Task `ruler`: the thirteen tasks of RULER, at lengths of one's own."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.options import suggest
from kvcompile.tasks.base import Sample, Task, Turn

log = logging.getLogger(__name__)

NEEDLES = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
)
GENERATED = (*NEEDLES, "vt", "cwe", "fwe")
FROM_FILES = {"qa_1": "squad", "qa_2": "hotpotqa"}  # and the field that names their file
_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class RulerSample(Sample):
    """A sample of one of RULER's tasks. any: one of its answers is enough."""

    any: bool = False


@dataclass(frozen=True)
class Ruler(Task):
    """RULER's tasks, `samples` prompts of each at each length.

    tokens: lengths, prompt and answer together, as RULER counts. tasks: by RULER's names; none: the eleven that are
    generated, and `qa_1`, `qa_2` where `squad`, `hotpotqa` name their files (of SQuAD, HotpotQA, LongBench, or with
    passages). seed: of everything drawn. haystack: the text of the needles, `reference`, `library` or a path.
    words: of keys and lists, `text`, `wonderwords` (that package) or a path. source: files of RULER's own prompts,
    asked instead of all this, as they are. chat: in the tokenizer's chat template.
    """

    name: ClassVar[str] = "ruler"
    summary: ClassVar[str] = "RULER: needles, variable tracking, word counts, questions about documents"
    metric: ClassVar[str] = "answers found"
    exact: ClassVar[bool] = False
    tokens: tuple[int, ...] = (1024,)
    tasks: tuple[str, ...] = ()
    samples: int = 4
    seed: int = 0
    haystack: str = "reference"
    words: str = "text"
    squad: str | None = None
    hotpotqa: str | None = None
    source: tuple[str, ...] = ()
    chat: bool = False

    def __post_init__(self) -> None:
        self.require(len(self.tokens) > 0 and min(self.tokens) >= 1, "tokens", "a list of lengths")
        self.require(self.samples >= 1, "samples", "1 or more")
        names = (*GENERATED, *FROM_FILES)
        for name in self.tasks:
            if name not in names:
                raise KvcompileError("tasks.ruler: unknown task", repr(name), suggest(name, names))
            if name in FROM_FILES and getattr(self, FROM_FILES[name]) is None:
                raise KvcompileError(
                    f"tasks.ruler: {name} needs a file", "none", f"tasks.ruler.{FROM_FILES[name]}=PATH"
                )

    def make_samples(self, tokenizer: Any, longest: int) -> Sequence[Sample]:
        """The prompts of every length and task."""
        return list(self._ready(tokenizer, longest) if self.source else self._generated(tokenizer, longest))

    def score(self, said: str, turn: Turn, sample: Sample) -> float:
        """Share of the answers that stand in what was said, in capitals or not; of questions 1 where any does."""
        text = _CONTROL.sub("\n", said.strip()).strip().lower()
        found = [answer.lower() in text for answer in turn.answers]
        if isinstance(sample, RulerSample) and sample.any:
            return float(any(found))
        return sum(found) / len(found)

    def _ready(self, tokenizer: Any, longest: int) -> Iterator[Sample]:
        from kvcompile.tasks.prompt import Encoder
        from kvcompile.tasks.ruler import ready

        encoder = Encoder(tokenizer, self.chat)
        for path in self.source:
            part = ready.name(path, (*GENERATED, *FROM_FILES))
            for i, draft in enumerate(ready.read(path, self.samples), 1):
                sample = _sample(f"{part} {i}", part, encoder, draft)
                self.require_short(_length(sample), longest)
                yield sample

    def _generated(self, tokenizer: Any, longest: int) -> Iterator[Sample]:
        from kvcompile.tasks.prompt import Encoder

        self.require_short(max(self.tokens), longest)
        encoder = Encoder(tokenizer, self.chat)
        subtasks = self._subtasks(encoder)
        for tokens in self.tokens:
            for name, each in subtasks.items():
                part = name + (f", {tokens}" if len(self.tokens) > 1 else "")
                for i, subtask in enumerate(each, 1):
                    draft = subtask.fitted(name, encoder, f"{self.seed}/{name}/{tokens}/{i}", tokens)
                    yield _sample(f"{part} {i}", part, encoder, draft)

    def _subtasks(self, encoder: Any) -> Mapping[str, Sequence[Any]]:
        """The samples of every task, before they have a length."""
        from kvcompile.calibration.text import sentences
        from kvcompile.tasks.ruler import documents
        from kvcompile.tasks.ruler.counts import CommonWords, FrequentWords
        from kvcompile.tasks.ruler.needles import needles
        from kvcompile.tasks.ruler.variables import Variables
        from kvcompile.tasks.ruler.words import words

        known, text = words(self.words), tuple(sentences(self.haystack))
        generated = {
            **needles(known, text),
            "vt": Variables.of(encoder),
            "cwe": CommonWords(known),
            "fwe": FrequentWords(),
        }
        subtasks: dict[str, Sequence[Any]] = {name: [each] * self.samples for name, each in generated.items()}
        for name, field in FROM_FILES.items():
            path = getattr(self, field)
            if path is not None:
                subtasks[name] = documents.read(path, f"tasks.ruler.{field}", self.samples)
            elif not self.tasks:
                log.info("ruler: %s is left out, tasks.ruler.%s names no file", name, field)
        return {name: subtasks[name] for name in self.tasks or subtasks}


def _sample(name: str, part: str, encoder: Any, draft: Any) -> RulerSample:
    context, ids = encoder.parted(draft.prompt)
    turn = Turn(ids, draft.answers, draft.wording.tokens)
    return RulerSample(name, part, context, (turn,), any=draft.wording.any)


def _length(sample: Sample) -> int:
    return len(sample.context) + sum(len(turn.ids) + turn.tokens for turn in sample.turns)
