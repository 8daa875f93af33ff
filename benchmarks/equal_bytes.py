"""Stacks at equal bytes: a decode step reads, or the cache holds, at most a share of the uncompressed one's bytes.

A line of a stacks file is `label: overrides as on the command line`. What may be chosen to fit stands in braces:

    {tokens}   whole numbers of tokens: the largest that fits
    {part}     thousandths of the tokens: the most that fit

A line without either is taken as it is: its bytes are what they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, Literal

from kvcompile.analysis.compare.contest import Contest, Runner
from kvcompile.analysis.compare.entry import FULL, Entry
from kvcompile.build import plan_of
from kvcompile.config.compose import compose
from kvcompile.config.schema import Config
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.plan.policy import Policy
from kvcompile.runtime.cache import KVCache
from kvcompile.stores import factory
from kvcompile.stores.base import POSITION_TYPE

DENSE = "dense"
THOUSANDTHS = 1000
MARK = 997  # stands for the size until it is known: a stack is composed once


@dataclass(frozen=True)
class Stack:
    """The overrides of one stack, and the share of the uncompressed bytes that a step may read (None: any)."""

    label: str
    overrides: tuple[str, ...]
    share: Fraction | None = None

    @property
    def fits(self) -> bool:
        """Whether something of it is chosen to fit a share."""
        return self.parts or any("{tokens}" in text for text in self.overrides)

    @property
    def parts(self) -> bool:
        """Whether that is a part of the tokens."""
        return any("{part}" in text for text in self.overrides)

    def filled(self, size: int) -> list[str]:
        """The overrides with `size` in place of what is chosen: tokens, or thousandths of them."""
        return [text.format(tokens=size, part=size / THOUSANDTHS) for text in self.overrides]


@dataclass(frozen=True)
class Planner:
    """Plans stacks on a model for prompts of `tokens` tokens, in caches of a dtype.

    of: which bytes are shared out: those that the next decode step reads, or those held, true positions of the entries
    included (the uncompressed cache needs none).
    """

    architecture: Any
    dtype: str
    tokens: int
    of: Literal["read", "held"] = "read"

    def fitted(self, stack: Stack) -> list[str]:
        """The overrides of the most bytes within the share. Raises KvcompileError where none are."""
        if stack.share is None or not stack.fits:
            return stack.filled(0)
        config = compose(stack.filled(MARK))
        low, high = 2, THOUSANDTHS if stack.parts else self.tokens  # a budget of 1 is the whole
        while low < high:
            middle = (low + high + 1) // 2
            try:
                within = self._share(config, sized(config, middle)) <= stack.share
            except KvcompileError:
                within = True  # too small for what always stays: only more can help
            low, high = (middle, high) if within else (low, middle - 1)
        least = self._share(config, sized(config, low))
        if least > stack.share:
            raise KvcompileError(
                f"{stack.label}: bytes {self.of} must be able to be as little as {stack.share} of the uncompressed",
                f"{float(least):.4f} at the least",
                "smaller sinks and windows, fewer layers that keep everything, or larger groups",
            )
        return stack.filled(low)

    def share(self, overrides: list[str]) -> Fraction:
        """Bytes after a prompt, as a share of the uncompressed ones."""
        config = compose(overrides)
        return self._share(config, config.policies())

    def _share(self, config: Config, policies: Sequence[Policy]) -> Fraction:
        layers = plan_of(self.architecture, self.dtype, config, policies).bytes(1, self.tokens)
        if self.of == "read":
            return Fraction(sum(layer.read for layer in layers), sum(layer.dense_read for layer in layers))
        held = sum(layer.bytes + layer.index_bytes + positions(layer.kept_total) for layer in layers)
        return Fraction(held, sum(layer.dense_bytes for layer in layers))


def positions(entries: int) -> int:
    """Bytes of the true positions of so many entries."""
    return entries * POSITION_TYPE.itemsize


def held(plan: Plan, cache: KVCache, dtype: str) -> int:
    """Bytes that a cache holds, positions included, where the model runs in `dtype`, whatever it ran in here."""
    total = cache.index_bytes()
    for p, layer in zip(plan.layers, cache.layers, strict=True):
        if layer.store is not None:
            lengths = layer.store.lengths
            lows = factory.low(layer.store)
            total += sum(p.nbytes(n, dtype, low) + positions(n) for n, low in zip(lengths, lows, strict=True))
    return total


@dataclass(frozen=True)
class Row:
    """A stack at work, under its label."""

    label: str
    overrides: tuple[str, ...]
    contest: Contest

    @property
    def entry(self) -> Entry:
        """As a contest knows it."""
        return Entry(" ".join(self.overrides) or FULL)

    @property
    def runner(self) -> Runner:
        """Built, and calibrated where it asks for that, when it is first wanted."""
        return self.contest.runner(self.entry)


def rows(contest: Contest, planner: Planner, known: Sequence[Stack]) -> list[Row]:
    """The uncompressed model and every stack that fits; those that do not are said and left out."""
    at_work = [Row(DENSE, (), contest)]
    for stack in known:
        try:
            row = Row(stack.label, tuple(planner.fitted(stack)), contest)
            contest.require_possible([row.entry])
            at_work.append(row)
        except KvcompileError as error:
            print(f"left out: {error}", file=sys.stderr)
    return at_work


def sized(config: Config, size: int) -> tuple[Policy, ...]:
    """The policies of a config that was composed with `MARK`, with `size` in its place."""
    places = {MARK: size, MARK / THOUSANDTHS: size / THOUSANDTHS}
    policies = []
    for policy in config.policies():
        values = {f.name: getattr(policy, f.name) for f in fields(policy) if f.init}
        marked = {name: places[v] for name, v in values.items() if isinstance(v, (int, float)) and v in places}
        policies.append(replace(policy, **marked))
    return tuple(policies)


def stacks(lines: Sequence[str], shares: Sequence[Fraction], parts: Sequence[str] = ("",)) -> list[Stack]:
    """The stacks of a file's lines, those that fit to a share once for each.

    parts: only those whose label contains one of these.
    """
    known = []
    for line in lines:
        label, _, overrides = (part.strip() for part in line.partition(":"))
        if not label or label.startswith("#"):
            continue
        stack = Stack(label, tuple(overrides.split()))
        known += [Stack(f"{label}, {share}", stack.overrides, share) for share in shares] if stack.fits else [stack]
    return [stack for stack in known if any(part in stack.label for part in parts)]
