"""What analyses of answers share: recipes answer prompts, part by part, and what they hold meanwhile."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvcompile.analysis.compare.entry import Entry, Question

if TYPE_CHECKING:
    from kvcompile.analysis.base import Subject
    from kvcompile.analysis.compare.contest import Contest

Record = dict[str, Any]


class Answers:
    """Answers of recipes to prompts, each measured once and found again by a later run."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @cached_property
    def contest(self) -> Contest:
        """Made for the first answer that is not measured yet."""
        from kvcompile.analysis.compare.contest import Contest

        subject = self.subject
        return Contest(subject.model, subject.tokenizer, subject.config.kernels, subject.progress)

    def of(self, entry: Entry, ids: Sequence[int], context: int, question: Question, count: int) -> Record:
        """What a recipe answers to a prompt (see `Contest.answer`).

        context: tokens before the question. count: of the answer, at most.
        """
        from kvcompile.analysis.compare.contest import tokens_read
        from kvcompile.analysis.parts import digest

        read = tokens_read(ids, context, question)
        unit = {"recipe": list(entry.overrides), "prompt": digest(list(ids)), "read": read, "count": count}
        unit["kernels"] = self.subject.config.kernels
        answer: Record = self.subject.part(unit, lambda: self.contest.answer(entry, ids, read, count))
        return answer


def shares(answers: Iterable[Record]) -> Record:
    """Bytes held, and read by a step, as shares of those of the uncompressed cache, over all answers."""
    every = list(answers)
    return {
        "held": sum(a["held"] for a in every) / sum(a["dense"] for a in every),
        "read": sum(a["read"] for a in every) / sum(a["dense_read"] for a in every),
    }


def right(answer: Record, number: str) -> bool:
    """Whether the digits come in an answer as one whole number."""
    return number in re.findall(r"\d+", answer["text"])


def percent(share: float, low: float, high: float) -> str:
    """`95 (76-99)`: a share and its interval, in percent."""
    return f"{100 * share:.0f} ({100 * low:.0f}-{100 * high:.0f})"
