"""Stacks at work on contexts: the right answers are forced, token by token, over the cache that a stack has left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcompile.analysis.compare.contest import Contest, Runner
from kvcompile.analysis.compare.forced import Forced, continued, forced
from kvcompile.analysis.parts import Parts, digest
from kvcompile.errors import KvcompileError
from kvcompile.searching.stack import DENSE, Stack
from kvcompile.searching.wish import Measured
from kvcompile.tasks.base import Question, Sample, Task, Turn

Tokens = tuple[int, ...]
TURNS = 2  # of a context that a search asks: another one of the same context says less than one of another


@dataclass(frozen=True)
class Context:
    """A sample of a task, and the right answers of its turns as tokens."""

    task: Task
    sample: Sample
    answers: tuple[tuple[Tokens, ...], ...] = ()

    @property
    def unit(self) -> list[object]:
        """What a measurement depends on: all tokens."""
        asked = [[turn.ids, answers] for turn, answers in zip(self.sample.turns, self.answers, strict=True)]
        return [digest([self.sample.context, asked, self.sample.rest, self.sample.chained])]


def contexts(tokenizer: Any, tasks: Sequence[Task], longest: int) -> list[Context]:
    """Everything that tasks ask, so that any number of first ones has as much of each part as can be.

    Raises KvcompileError for a turn that says no right answer.
    """
    parts: dict[str, list[Context]] = {}
    for task in tasks:
        for sample in task.make_samples(tokenizer, longest):
            answers = tuple(_encoded(tokenizer, task, turn) for turn in sample.turns)
            parts.setdefault(f"{task.name} {sample.part}", []).append(Context(task, sample, answers))
    names = list(parts)
    step = next(s for s in range(len(names) // 2 + 1, len(names) + 2) if math.gcd(s, len(names)) == 1)
    turns = [parts[names[i * step % len(names)]] for i in range(len(names))]
    return [part[i] for i in range(max(map(len, turns))) for part in turns if i < len(part)]


def _encoded(tokenizer: Any, task: Task, turn: Turn) -> tuple[Tokens, ...]:
    """The right answers as they go on from the turn: after a space, unless it ends with one or a line."""
    if not turn.answers:
        raise KvcompileError(f"tasks.{task.name}: a search forces right answers, and this task names none", "none")
    space = "" if str(tokenizer.decode(list(turn.ids)[-1:]))[-1:].isspace() else " "
    return tuple(tuple(tokenizer(space + a, add_special_tokens=False)["input_ids"]) for a in turn.answers)


@dataclass(frozen=True)
class Meter:
    """Measures stacks, each on each context once. questions: seen, hidden, or both."""

    contest: Contest
    parts: Parts
    questions: tuple[Question, ...]

    def known(self, stack: Stack, context: Context) -> bool:
        """Whether it is measured already."""
        return self._unit(stack, context) in self.parts

    @torch.inference_mode()
    def of(self, stack: Stack, context: Context) -> Measured:
        """What a stack makes of a context: `answers`, for each `[exact, nll]`, or the `loss` of the text after it."""
        measured: Measured = self.parts.of(self._unit(stack, context), lambda: self._measure(stack, context))
        return measured

    def dense(self, context: Context) -> Measured:
        """What the uncompressed model makes of it."""
        return self.of(DENSE, context)

    def forget(self, stack: Stack) -> None:
        """Let the model of a stack go."""
        self.contest.forget(stack.entry)

    def refresh(self) -> None:
        """Find what other processes have measured."""
        self.parts.refresh()

    def _unit(self, stack: Stack, context: Context) -> dict[str, Any]:
        return {"stack": stack.overrides, "context": context.unit, "questions": self.questions}

    def _measure(self, stack: Stack, context: Context) -> dict[str, Any]:
        runner, sample = self.contest.runner(stack.entry), context.sample
        if sample.rest:
            cache = runner.cache(sample.context, len(sample.context))
            return {"loss": round(continued(runner, cache, sample.rest), 5)}
        asked = (_hidden if question == "hidden" else _seen for question in self.questions)
        return {"answers": [_best(tried) for ask in asked for tried in ask(runner, context)]}


def _hidden(runner: Runner, context: Context) -> Iterator[list[Forced]]:
    """Each turn as the next one of a chat, over a copy of the cache of the context, or, chained, over that itself."""
    sample = context.sample
    cache = runner.cache(sample.context, len(sample.context))
    for turn, answers in zip(sample.turns, context.answers, strict=True):
        yield [forced(runner, cache.fork(), turn.ids, answer) for answer in answers]
        if sample.chained:
            forced(runner, cache, turn.ids, (*answers[0], answers[0][-1]))


def _seen(runner: Runner, context: Context) -> Iterator[list[Forced]]:
    """Each turn in the prompt that the cache is made of, but for its last token."""
    sample = context.sample
    for turn, answers in zip(sample.turns[:1] if sample.chained else sample.turns, context.answers, strict=False):
        cache = runner.cache((*sample.context, *turn.ids[:-1]), len(sample.context))
        yield [forced(runner, cache.fork(), turn.ids[-1:], answer) for answer in answers]


def _best(tried: Sequence[Forced]) -> list[float]:
    return [float(any(each.exact for each in tried)), round(min(each.nll for each in tried), 5)]


def few(context: Context) -> Context:
    """A context with no more turns than a search asks; chained ones stay together."""
    sample = context.sample
    if sample.chained:
        return context
    return replace(context, sample=replace(sample, turns=sample.turns[:TURNS]), answers=context.answers[:TURNS])
