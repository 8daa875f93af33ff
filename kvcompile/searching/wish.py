"""What is wished for, how a stack scored, and which of two stacks comes nearer to the wish."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from kvcompile.evaluation.intervals import standard_error

WORST = 100.0  # nats, or a ratio: what is no number is at least so bad


@dataclass(frozen=True)
class Score:
    """What a stack made of some contexts, beside the uncompressed model on the same ones.

    Attributes:
        contexts: how many were asked about.
        excess: negative log-likelihood of the right answers, nats a token, less the uncompressed model's; mean over
            contexts. error: its standard error.
        quality: exact answers as a share of the uncompressed model's; None where that gives none.
        perplexity: of text after a context, as a multiple of the uncompressed model's; None where none was read.
        surely: what it is at the least, a standard error below; 0 of a single text, which says nothing of others.
        answers: right ones of the uncompressed model.
    """

    contexts: int
    excess: float
    error: float
    quality: float | None
    perplexity: float | None
    surely: float | None = None
    answers: int = 0

    def plain(self) -> dict[str, Any]:
        """As data."""
        return asdict(self)


Measured = Mapping[str, Any]  # {"answers": [[exact, nll], ...]}, or {"loss": nll} of a text


def score(measured: Iterable[tuple[Measured, Measured]]) -> Score:
    """The score of pairs of what a stack and the uncompressed model made of a context. Raises ValueError for none."""
    asked, losses = [], []
    for stack, dense in measured:
        if "loss" in stack:
            losses.append(stack["loss"] - dense["loss"])
        else:
            asked.append(list(zip(stack["answers"], dense["answers"], strict=True)))
    excess, error = standard_error([[a[1] - b[1] for a, b in context] for context in asked])
    right, best = (statistics.fmean(statistics.fmean(pair[i][0] for pair in c) for c in asked) for i in (0, 1))
    middle = statistics.fmean(losses) if losses else 0.0
    error_of_losses = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.inf
    return Score(
        contexts=len(asked),
        excess=_finite(excess),
        error=_finite(error),
        quality=right / best if best else None,
        perplexity=_exp(middle) if losses else None,
        surely=_exp(middle - error_of_losses) if losses else None,
        answers=round(sum(pair[1][0] for context in asked for pair in context)),
    )


def _exp(nats: float) -> float:
    return math.exp(min(nats, math.log(WORST)))


def _finite(value: float) -> float:
    return min(value, WORST) if math.isfinite(value) else WORST


@dataclass(frozen=True)
class Wish:
    """Bytes at most, quality at least, perplexity at most; None: open.

    bytes: share of the uncompressed cache in bfloat16. quality: share of its right answers. perplexity: a multiple.
    """

    bytes: Fraction | None = None
    quality: float | None = None
    perplexity: float | None = None

    @property
    def aims(self) -> int:
        """What is made small: the excess, and the bytes where they are not wished for alone."""
        return 1 if self.bytes is not None and self.quality is None else 2

    def values(self, share: float, found: Score) -> list[float]:
        """What is made small, of a stack that holds this share."""
        return [found.excess, share][: self.aims]

    def constraints(self, share: float, found: Score) -> dict[str, float]:
        """By what a stack misses the wish: 0 or less where it does not. Few texts make it miss only what is sure."""
        misses = {}
        if self.bytes is not None:
            misses["bytes"] = share / float(self.bytes) - 1
        if self.quality is not None and found.quality is not None:
            misses["quality"] = self.quality - found.quality
        if self.perplexity is not None and found.perplexity is not None:
            least = found.perplexity if found.surely is None else found.surely
            misses["perplexity"] = least - self.perplexity
        return misses

    def standing(self, number: int, share: float, found: Score) -> Standing:
        """Where a stack stands."""
        missed = sum(max(0.0, miss) for miss in self.constraints(share, found).values())
        return Standing(number, missed, tuple(self.values(share, found)))


@dataclass(frozen=True)
class Standing:
    """A stack among others. missed: by how much it misses the wish. values: what is to be small."""

    number: int
    missed: float
    values: tuple[float, ...]

    def beats(self, other: Standing) -> bool:
        """Whether it is nowhere worse, and somewhere better."""
        pairs = list(zip(self.values, other.values, strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def ordered(standings: Sequence[Standing]) -> list[Standing]:
    """The best first: those that miss nothing, by how many of them beat it; then those that miss least."""
    able = [s for s in standings if s.missed <= 0]
    beaten = {s.number: sum(other.beats(s) for other in able) for s in able}
    rest = sorted((s for s in standings if s.missed > 0), key=lambda s: (s.missed, s.values, s.number))
    return [*sorted(able, key=lambda s: (beaten[s.number], s.values, s.number)), *rest]


def front(standings: Sequence[Standing]) -> list[Standing]:
    """Those that miss nothing and that no other of them beats, in the order of what is made small last."""
    able = [s for s in standings if s.missed <= 0]
    return sorted((s for s in able if not any(o.beats(s) for o in able)), key=lambda s: s.values[::-1])


def survivors(standings: Sequence[Standing], mine: Iterable[int], one_in: int) -> list[int]:
    """Successive halving: of all that have come so far, the best one in so many go on; of those, `mine`.

    Asynchronous (ASHA, arXiv 1810.05934): a later stack is compared with all before it, none is waited for.
    """
    wanted = set(mine)
    best = ordered(standings)[: math.ceil(len(standings) / one_in)]
    return [s.number for s in best if s.number in wanted]
