"""Task `needle`: numbers hidden in several texts, asked for in several wordings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvcompile.tasks.base import Sample, Task, Turn

ANSWER = 10  # tokens: seven digits, a space, and what a tokenizer may put around them


@dataclass(frozen=True)
class Needle(Task):
    """Numbers hidden in real text, `samples` contexts of `tokens` tokens for each text, wording and length.

    forms: wordings (`magic`, `two_keys`, `four_keys`, `reference`, `story`, `passcode`); of several keys all are asked,
    each of a copy of the cache. haystacks: `reference` (Python's language reference), `library` (docstrings of its
    standard library), or paths of text files; `:first` or `:last` behind one takes that half. depths: where the
    number is hidden, 0 at the start and 1 at the end. seed: of keys, numbers and places.
    A prompt is at most `tokens` long with its question.
    """

    name: ClassVar[str] = "needle"
    summary: ClassVar[str] = "numbers hidden in real text, in several texts and wordings"
    tokens: tuple[int, ...] = (1024,)
    forms: tuple[str, ...] = ("magic", "passcode")
    haystacks: tuple[str, ...] = ("reference", "library")
    samples: int = 4
    depths: tuple[float, ...] = (0.1, 0.35, 0.6, 0.85)
    seed: int = 0

    def __post_init__(self) -> None:
        self.require(len(self.tokens) > 0 and min(self.tokens) >= 64, "tokens", "a list of lengths of 64 or more")
        self.require(len(self.forms) > 0, "forms", "one or more")
        self.require(len(self.haystacks) > 0, "haystacks", "one or more")
        self.require(self.samples >= 1, "samples", "1 or more")
        self.require(bool(self.depths) and all(0 <= d <= 1 for d in self.depths), "depths", "a list in [0, 1]")

    def make_samples(self, tokenizer: Any, longest: int) -> Sequence[Sample]:
        """The contexts of every text, wording and length."""
        self.require_short(max(self.tokens) + ANSWER, longest)
        kinds = itertools.product(self.tokens, self.haystacks, self.forms)
        return [sample for kind in kinds for sample in self._of(tokenizer, *kind)]

    def _of(self, tokenizer: Any, tokens: int, haystack: str, form: str) -> Iterator[Sample]:
        from kvcompile.evaluation.needle import NeedleTask

        task = NeedleTask(tokens, self.samples, self.depths, self.seed, form, haystack, ANSWER)
        part = f"{Path(haystack).name}, {form}" + (f", {tokens}" if len(self.tokens) > 1 else "")
        for i, group in enumerate(task.groups(tokenizer)):
            context = tuple(group[0].ids[: group[0].context])
            turns = tuple(Turn(tuple(p.ids[p.context :]), (p.answer,), ANSWER) for p in group)
            yield Sample(f"{part} {i + 1}", part, context, turns)

    def score(self, said: str, turn: Turn, sample: Sample) -> float:
        """1 where the digits come as one whole number."""
        return float(turn.answers[0] in re.findall(r"\d+", said))
