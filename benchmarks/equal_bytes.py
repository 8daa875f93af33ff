"""Stacks whose decode step reads at most a share of the bytes that it reads of the uncompressed cache.

A line of a stacks file is `label: overrides as on the command line`. What may be chosen to fit stands in braces:

    {tokens}   whole numbers of tokens: the largest that fits
    {part}     thousandths of the tokens: the most that fit

A line without either is taken as it is: its bytes are what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

from kvcompile.build import plan_of
from kvcompile.config.compose import compose
from kvcompile.config.schema import Config
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.plan.policy import Policy

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
    """Plans stacks on a model for prompts of `tokens` tokens, in caches of a dtype."""

    architecture: Any
    dtype: str
    tokens: int

    def fitted(self, stack: Stack) -> list[str]:
        """The overrides whose step reads the most within the share. Raises KvcompileError where none does."""
        if stack.share is None or not stack.fits:
            return stack.filled(0)
        config = compose(stack.filled(MARK))
        low, high = 2, THOUSANDTHS if stack.parts else self.tokens  # a budget of 1 is the whole
        while low < high:
            middle = (low + high + 1) // 2
            try:
                within = self._read(config, sized(config, middle)) <= stack.share
            except KvcompileError:
                within = True  # too small for what always stays: only more can help
            low, high = (middle, high) if within else (low, middle - 1)
        least = self._read(config, sized(config, low))
        if least > stack.share:
            raise KvcompileError(
                f"{stack.label}: a step must be able to read as little as {stack.share} of what it reads uncompressed",
                f"{float(least):.4f} at the least",
                "smaller sinks and windows, fewer layers that read everything, or larger groups",
            )
        return stack.filled(low)

    def read(self, overrides: list[str]) -> Fraction:
        """Bytes that the step after a prompt reads, as a share of those of the uncompressed cache."""
        config = compose(overrides)
        return self._read(config, config.policies())

    def _read(self, config: Config, policies: Sequence[Policy]) -> Fraction:
        layers = plan_of(self.architecture, self.dtype, config, policies).bytes(1, self.tokens)
        return Fraction(sum(layer.read for layer in layers), sum(layer.dense_read for layer in layers))

    def plan(self, overrides: list[str], calibrated: Any) -> Plan:
        """The plan of a stack, its policies calibrated."""
        config = compose(overrides)
        policies = tuple(policy.calibrated(calibrated) for policy in config.policies())
        return plan_of(self.architecture, self.dtype, config, policies)


def sized(config: Config, size: int) -> tuple[Policy, ...]:
    """The policies of a config that was composed with `MARK`, with `size` in its place."""
    places = {MARK: size, MARK / THOUSANDTHS: size / THOUSANDTHS}
    policies = []
    for policy in config.policies():
        values = {f.name: getattr(policy, f.name) for f in fields(policy) if f.init}
        marked = {name: places[v] for name, v in values.items() if isinstance(v, (int, float)) and v in places}
        policies.append(replace(policy, **marked))
    return tuple(policies)


def stacks(lines: list[str], shares: list[Fraction]) -> list[Stack]:
    """The stacks of a file's lines, those that fit to a share once for each."""
    found = []
    for line in lines:
        label, _, overrides = (part.strip() for part in line.partition(":"))
        if not label or label.startswith("#"):
            continue
        stack = Stack(label, tuple(overrides.split()))
        found += [Stack(f"{label}, {share}", stack.overrides, share) for share in shares] if stack.fits else [stack]
    return found
