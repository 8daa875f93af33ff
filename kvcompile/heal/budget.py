"""How far a training is: budgets of tokens and minutes, the two stages, and the learning rate that follows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["layers", "model"]
WARM_UP = 0.05  # of a stage
LEAST = 0.02  # of the peak learning rate, at the end of a stage


@dataclass
class Pace:
    """Fraction of the budget that is spent, whichever runs out first; `agree` gives all processes the same seconds.

    steps: the budget of tokens in optimizer steps; minutes: of wall clock (None: no limit), over all sessions.
    layers: fraction of the budget in which the layers learn alone.
    """

    steps: int
    minutes: float | None
    layers: float
    agree: Callable[[float], float] = lambda seconds: seconds
    clock: Callable[[], float] = time.monotonic
    fraction: float = 0.0
    elapsed: float = 0.0  # seconds, when `fraction` was found
    trained: Stage | None = None  # what the last step trained
    before: float = 0.0  # seconds of earlier sessions
    started: float = field(default=0.0)

    def start(self, seconds: float, step: int) -> None:
        """Begin or resume, after `seconds` and `step` steps of earlier sessions."""
        self.before, self.started = seconds, self.clock()
        self.at(step)
        self.trained = self.stage

    @property
    def seconds(self) -> float:
        """Wall clock so far, over all sessions."""
        return self.before + self.clock() - self.started

    def at(self, step: int) -> None:
        """Note that `step` steps are done."""
        self.trained = self.stage
        self.elapsed = self.agree(self.seconds)
        timed = self.elapsed / (60 * self.minutes) if self.minutes else 0.0
        self.fraction = min(1.0, max(step / self.steps, timed))

    @property
    def stage(self) -> Stage:
        """What the next step trains."""
        return "layers" if self.fraction < self.layers else "model"

    @property
    def spent(self) -> bool:
        """Whether to stop."""
        return self.fraction >= 1

    def rate(self, layers_lr: float, lr: float) -> float:
        """Learning rate now: in each stage a linear warm-up to its peak, then half a cosine down to almost nothing."""
        alone = self.stage == "layers"
        begin, end = (0.0, self.layers) if alone else (self.layers, 1.0)
        x = (self.fraction - begin) / (end - begin) if end > begin else 1.0
        shape = LEAST + (1 - LEAST) * (1 + math.cos(math.pi * (x - WARM_UP) / (1 - WARM_UP))) / 2
        return (layers_lr if alone else lr) * (max(x / WARM_UP, LEAST) if x < WARM_UP else shape)
