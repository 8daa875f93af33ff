"""The search itself: stacks are drawn, planned, and climb rungs of more and more contexts as long as they are good."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

from kvcompile.errors import KvcompileError, first_line
from kvcompile.progress import Progress, silent
from kvcompile.searching.fit import Fitter, OverBytes
from kvcompile.searching.space import Space
from kvcompile.searching.stack import Stack
from kvcompile.searching.study import Study, Tried
from kvcompile.searching.wish import Measured, Score, Standing, Wish, score, survivors

if TYPE_CHECKING:
    import optuna

ONE_IN = 3  # of the stacks of a rung, so many climb to the next
FRUITLESS = 60  # drawn stacks in a row that cannot be, or were tried, after which there is nothing more to find
BYTES = "bytes"


class Measure(Protocol):
    """What stacks are measured by (`Meter`)."""

    def of(self, stack: Stack, context: Any) -> Measured:
        """What a stack makes of a context."""

    def dense(self, context: Any) -> Measured:
        """What the uncompressed model makes of it."""

    def forget(self, stack: Stack) -> None:
        """A stack is done with."""

    def refresh(self) -> None:
        """Find what others have measured."""


@dataclass(frozen=True)
class Clock:
    """Seconds of work that are left."""

    seconds: float
    now: Callable[[], float] = time.monotonic
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "begun", self.now())

    @property
    def over(self) -> bool:
        """Whether they are over."""
        return self.now() - self.begun >= self.seconds


@dataclass
class Climber:
    """A trial of this process. measured: of each context so far, what the stack and the uncompressed model made.

    scores: one for each rung. failed: it has been told already that the stack cannot be.
    """

    trial: optuna.Trial
    stack: Stack
    share: float
    measured: list[tuple[Measured, Measured]] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    failed: bool = False


@dataclass(frozen=True)
class Search:
    """Everything that a search goes by.

    rungs: contexts of each, every one beginning with those of the one before. batch: stacks that are read in turns,
    so that a context is read once for them. stacks: measured at most (None: any number). say: gets a line about each
    stack that fails.
    """

    study: Study
    space: Space
    wish: Wish
    fitter: Fitter
    meter: Measure
    rungs: Sequence[Sequence[Any]]
    batch: int = 6
    stacks: int | None = None
    progress: Progress = silent
    say: Callable[[str], None] = print

    def run(self, clock: Clock) -> None:
        """Search until the time is over, or nothing more is found; a study without any score gets one in any case.

        Raises KvcompileError where no stack can be.
        """
        self.study.begin([self.space.begin(first) for first in self.space.first])
        left = math.inf if self.stacks is None else self.stacks
        while left and (not clock.over or (clock.seconds and not self._scored)):
            self.study.rescue()
            self.meter.refresh()
            climbers = self.ask(clock, int(min(self.batch, left)))
            left -= len(climbers)
            if not climbers:
                break
            self.climb(climbers, clock)
        if clock.seconds and not self.study.tried():
            raise KvcompileError(
                f"search space {self.space.name} must hold a stack that can be", self.study.reason(), "more bytes"
            )

    @property
    def _scored(self) -> bool:
        return any(t.scores for t in self.study.tried())

    def ask(self, clock: Clock, batch: int) -> list[Climber]:
        """The next stacks, one where the time is over; what cannot be is told at once, before anything is measured."""
        climbers: list[Climber] = []
        known = {each.stack.overrides for each in self.study.tried()}
        fruitless = 0
        while len(climbers) < batch and fruitless < FRUITLESS:
            if clock.over:
                batch = 1
            trial = self.study.ask()
            climber = self._planned(trial)
            if climber is None or climber.stack.overrides in known:
                fruitless += 1
                if climber is not None:
                    self.study.drop(trial, again=False)
                continue
            known.add(climber.stack.overrides)
            fruitless = 0
            self.study.take(trial, climber.stack, climber.share)
            climbers.append(climber)
        return climbers

    def _planned(self, trial: optuna.Trial) -> Climber | None:
        """The stack of a trial, its budget solved; None, and told so, where it cannot be."""
        most = self._most(trial)
        try:
            stack, share = self.fitter.fitted(self.space.draw(trial), most)
        except OverBytes as error:
            self.study.refuse(trial, BYTES, float(error.share / most) - 1, str(error))
            return None
        except KvcompileError as error:
            self.study.refuse(trial, "plan", 1.0, str(error))
            return None
        return Climber(trial, stack, float(share))

    def _most(self, trial: optuna.Trial) -> Fraction:
        """Bytes at most: those wished for, or, where their number is open, drawn."""
        if self.wish.aims == 1 and self.wish.bytes is not None:
            return self.wish.bytes
        shares = self.space.bytes
        if self.wish.bytes is not None:
            high = float(self.wish.bytes)
            shares = replace(shares, low=min(shares.low, high), high=min(shares.high, high))
        return Fraction(shares.draw(BYTES, trial)).limit_denominator(10**6)

    def climb(self, climbers: Sequence[Climber], clock: Clock) -> None:
        """Rung by rung: all are asked about its contexts, the best go on. Whatever happens, each trial is told."""
        left, done = list(climbers), 0
        whatever = None if self._scored else climbers[0]  # the one that climbs a rung when there is no time
        for number, rung in enumerate(self.rungs):
            for i, context in enumerate(rung[done:]):
                left = [c for c in left if self._measured(c, context, clock, c is whatever)]
                self.progress(f"rung {number + 1}, {len(left)} stacks", i + 1, len(rung) - done)
            if clock.over and whatever not in left:
                break
            done, whatever = len(rung), None
            for c in left:
                c.scores.append(score(c.measured))
                self.study.climbed(c.trial, c.scores)
            if number + 1 < len(self.rungs):
                left = self._halved(left, number)
        for c in climbers:
            self._tell(c)

    def _measured(self, c: Climber, context: Any, clock: Clock, whatever: bool) -> bool:
        """Whether a stack goes on after a context: unless it fails, or the time is over and it counts."""
        if clock.over and not whatever:
            return False
        try:
            c.measured.append((self.meter.of(c.stack, context), self.meter.dense(context)))
        except (KvcompileError, RuntimeError) as error:  # what plans cannot know, such as memory
            self.say(f"left out: {' '.join(c.stack.overrides)}: {first_line(error)}")
            self.study.refuse(c.trial, "run", 1.0, first_line(error))
            self.meter.forget(c.stack)
            c.failed = True
            return False
        self.study.alive(c.trial)
        return True

    def _halved(self, climbers: Sequence[Climber], rung: int) -> list[Climber]:
        known = [self.standing(t, rung) for t in self.study.tried() if len(t.scores) > rung]
        chosen = survivors(known, [c.trial.number for c in climbers], ONE_IN)
        return [c for c in climbers if c.trial.number in chosen]

    def standing(self, tried: Tried, rung: int) -> Standing:
        """Where a stack stood after a rung."""
        return self.wish.standing(tried.number, tried.share, tried.scores[rung])

    def _tell(self, c: Climber) -> None:
        if c.failed:
            return
        if c.scores:
            last = c.scores[-1]
            self.study.tell(c.trial, self.wish.values(c.share, last), self.wish.constraints(c.share, last))
        else:
            self.study.drop(c.trial, again=True)
        self.meter.forget(c.stack)

    def found(self) -> list[Tried]:
        """The stacks that have climbed as high as any, in the order in which they came."""
        tried = self.study.tried()
        highest = max((len(t.scores) for t in tried), default=0)
        return [t for t in tried if highest and len(t.scores) == highest]
