"""What a task is: a frozen dataclass whose fields are its options, samples made of them, and a score of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kvcompile.errors import KvcompileError

Question = Literal["seen", "hidden"]
QUESTIONS: tuple[Question, ...] = ("seen", "hidden")


@dataclass(frozen=True)
class Turn:
    """What is said after a context: token ids, the right answers, and how many tokens an answer may have at most."""

    ids: tuple[int, ...]
    answers: tuple[str, ...]
    tokens: int


@dataclass(frozen=True)
class Sample:
    """A context, and what is asked about it; or the text that follows it.

    Attributes:
        name: tells samples of a task apart; the same for the same task and tokenizer.
        part: what scores are shown by, beside the whole: a haystack, a depth, a subtask. Parts weigh the same.
        context: token ids, what a cache is made of where the question is hidden.
        turns: questions. Each is asked of a copy of the cache, or, `chained`, one after the other of one cache.
        rest: token ids after the context. It is not asked but scored: a sample has turns or a rest.
        chained: every turn meets the turns and answers before it.
    """

    name: str
    part: str
    context: tuple[int, ...]
    turns: tuple[Turn, ...] = ()
    rest: tuple[int, ...] = ()
    chained: bool = False


@dataclass(frozen=True)
class Task:
    """Base of all tasks. `name` is how `evaluate=` calls it, `summary` the one line that `kvcompile ls` prints.

    The module of a task imports neither torch nor transformers at its top: its fields are the options
    `tasks.<name>.<field>`, which `kvcompile --help` needs.

    Attributes:
        metric: what a score of 1 means, in a few words, for the heading of a table.
        exact: every score is 0 or 1, so that a mean has Wilson's interval.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    metric: ClassVar[str] = "right answers"
    exact: ClassVar[bool] = True

    def make_samples(self, tokenizer: Any, longest: int) -> Sequence[Sample]:
        """The samples, the same for the same options and tokenizer.

        longest: positions that the model knows. Raises KvcompileError for samples that would be longer, and sources
        that cannot be read.
        """
        raise NotImplementedError

    def require_short(self, tokens: int, longest: int) -> None:
        """Raise KvcompileError for samples of more tokens than the model knows."""
        if tokens > longest:
            raise KvcompileError(
                f"tasks.{self.name}: samples must not be longer than the {longest:,} tokens that the model knows",
                tokens,
            )

    def part(self, sample: Sample, turn: int) -> str:
        """What the score of a turn is shown by: the sample's own part."""
        return sample.part

    def score(self, said: str, turn: Turn, sample: Sample) -> float:
        """How right an answer is, 0 to 1. Only samples with turns have answers."""
        raise NotImplementedError

    def require(self, ok: bool, field: str, rule: str) -> None:
        """Range check of a field, for `__post_init__`. Raises KvcompileError naming `tasks.<name>.<field>`."""
        if not ok:
            raise KvcompileError(f"tasks.{self.name}: {field} must be {rule}", repr(getattr(self, field)))
