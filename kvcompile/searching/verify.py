"""The proof: what a search found answers by itself, on texts, seeds and wordings that the search never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from kvcompile.analysis.compare.contest import Contest
from kvcompile.analysis.parts import Parts
from kvcompile.options import options_of
from kvcompile.progress import Progress
from kvcompile.searching.climb import Clock
from kvcompile.searching.fit import as_part
from kvcompile.searching.meter import Context
from kvcompile.searching.stack import DENSE, Stack
from kvcompile.searching.wish import Wish
from kvcompile.tasks.ask import respondent
from kvcompile.tasks.base import Question
from kvcompile.tasks.rows import Record
from kvcompile.tasks.scores import Estimate, against_dense


@dataclass(frozen=True)
class Proof:
    """What a stack, and the uncompressed model, made of contexts that the search never saw.

    Answers are generated, and scored as their task says.
    """

    stack: Stack
    records: tuple[Record, ...]
    dense: tuple[Record, ...]

    @property
    def quality(self) -> Estimate | None:
        """Share of the uncompressed model's score that is kept, the mean of all parts."""
        return against_dense([r for r in self.records if r.nll is None], self.dense)

    @property
    def perplexity(self) -> Estimate | None:
        """As a multiple of the uncompressed model's."""
        return against_dense([r for r in self.records if r.nll is not None], self.dense)

    @property
    def share(self) -> Fraction:
        """Measured bytes, positions included, of the uncompressed cache's in bfloat16."""
        sizes = [r.size for r in self.records]
        return Fraction(sum(s.held16 + s.positions for s in sizes), sum(s.dense16 for s in sizes))

    def misses(self, wish: Wish) -> list[str]:
        """By what it misses a wish, in words; nothing where it does not."""
        said = []
        if wish.bytes is not None and float(self.share) > 1.005 * float(wish.bytes):  # prompts are a bit shorter
            said.append(f"it holds {as_part(self.share)} of the bytes, more than {as_part(wish.bytes)}")
        quality, perplexity = self.quality, self.perplexity
        if wish.quality is not None and quality is not None and quality.value < wish.quality:
            said.append(f"it keeps {quality.value:.1%} of the answers, less than {wish.quality:.1%}")
        if wish.perplexity is not None and perplexity is not None and perplexity.value > wish.perplexity:
            said.append(f"perplexity is {perplexity.value:.3f} times the uncompressed one, more than {wish.perplexity}")
        return said


@dataclass(frozen=True)
class Verifier:
    """Asks stacks what the search never did. unseen: contexts, some of each part first."""

    contest: Contest
    tokenizer: Any
    parts: Parts
    questions: tuple[Question, ...]
    unseen: Sequence[Context]
    progress: Progress

    def prove(self, stacks: Sequence[Stack], clock: Clock, least: int) -> list[Proof]:
        """A proof of each stack, all on the same contexts: `least` at the least, and more as long as there is time.

        What was asked before costs no time. Nothing of `least` 0 that was not.
        """
        records: dict[tuple[str, ...], list[Record]] = {}
        for i, context in enumerate(self.unseen):
            wanted = [(stack, question) for stack in (DENSE, *stacks) for question in self._questions(context)]
            late = clock.over and i >= least
            if late and not all(self._unit(stack, context, question) in self.parts for stack, question in wanted):
                break
            for stack, question in wanted:
                records.setdefault(stack.overrides, []).extend(self._ask(stack, context, question))
            self.progress("verification", i + 1, len(self.unseen))
        dense = tuple(records.get((), ()))
        return [Proof(stack, tuple(records[stack.overrides]), dense) for stack in stacks if records]

    def _questions(self, context: Context) -> tuple[Question, ...]:
        return ("hidden",) if context.sample.rest else self.questions

    def _ask(self, stack: Stack, context: Context, question: Question) -> list[Record]:
        def ask() -> list[dict[str, Any]]:
            by = respondent(self.contest.runner(stack.entry), self.tokenizer)
            return [asdict(record) for record in by.ask(context.task, context.sample, question)]

        plain = self.parts.of(self._unit(stack, context, question), ask)
        named = f"{context.task.name}, {question} " if len(self.questions) > 1 else f"{context.task.name} "
        return [Record.from_json({**r, "sample": named + r["sample"], "part": named + r["part"]}) for r in plain]

    def _unit(self, stack: Stack, context: Context, question: Question) -> dict[str, Any]:
        task = options_of([context.task])
        return {"proof": stack.overrides, "context": context.unit, "question": question, "task": task}
