"""What records say: the mean score or the perplexity, its interval, and how it stands to the dense model's.

Everything that is said of rows is said by these functions: on screen, in a report, on a board.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvcompile.evaluation.intervals import ratio_of_sums, wilson
from kvcompile.tasks.rows import Record

PROTOCOL = {  # what stands beside every table: how was asked, and what the numbers are
    "seen": "seen: the question is in sight when the cache is made: of context and question but for its last token.",
    "hidden": "hidden: the cache is made of the context alone; what is asked, or read, comes after it.",
    "answers": "Answers are greedy, every token of them predicted over that cache.",
    "intervals": (
        "Intervals of 95 %: Wilson's for right answers, questions about one context counted as one; otherwise a "
        "bootstrap over contexts. Parts weigh the same."
    ),
    "bytes": "Bytes: keys, values, scales and indices of a model in bfloat16, after the context.",
}
HIGHEST = 700.0  # nats; exp() of more is no float


@dataclass(frozen=True)
class Estimate:
    """A number, and its interval of 95 %.

    Attributes:
        contexts: how many it rests on. answers: how many turns were scored over them, or texts read.
    """

    value: float
    low: float
    high: float
    contexts: int
    answers: int


@dataclass(frozen=True)
class _Context:
    """One context: what it weighs, the mean of its turns, and the dense model's of the same turns."""

    weight: int
    value: float
    dense: float = 0.0


def quality(records: Sequence[Record], exact: bool) -> Estimate:
    """The mean score in [0, 1], or the perplexity exp(mean nll), with its interval.

    The mean is that of the parts, a part's that of its contexts, a context's that of its turns. Turns over one context
    need not be independent, so that a context counts as one answer however many were given:

    exact: Wilson's interval of n = sum(w)^2 / sum(w^2) answers, w = 1 / (contexts of the part).
    otherwise: percentile bootstrap over contexts. Where all score the same there is nothing to draw: Wilson's again.

    records: one or more.
    """
    contexts = _contexts(records)
    if read(records):
        return _estimate(_mean_nll(contexts), contexts, records)
    values, weights = [c.weight * c.value for c in contexts], [c.weight for c in contexts]
    if exact or len({c.value for c in contexts}) == 1:
        share = sum(values) / sum(weights)
        count = sum(weights) ** 2 / sum(w * w for w in weights)
        return _estimate((share, *wilson(share * count, count)), contexts, records)
    return _estimate(ratio_of_sums(values, weights), contexts, records)


def mean(records: Sequence[Record]) -> float:
    """The value of `quality` without its interval."""
    contexts = _contexts(records)
    value = sum(c.weight * c.value for c in contexts) / sum(c.weight for c in contexts)
    return math.exp(min(value, HIGHEST)) if read(records) else value


def against_dense(records: Sequence[Record], dense: Sequence[Record]) -> Estimate | None:
    """The share of the dense model's score that is kept, or the ratio of the perplexities, on what both were asked.

    Contexts are paired by name and turn, and drawn in pairs (percentile bootstrap). Where every draw of n has the same
    share, a share c = z^2 / (n + z^2) of contexts may still be otherwise (Wilson's bound of what was never seen): the
    interval is that of these scoring 0, and 1.

    None where they have nothing in common, and where the dense model scores 0.
    """
    theirs = {(record.sample, record.turn): record for record in dense}
    common = [record for record in records if (record.sample, record.turn) in theirs]
    if not common:
        return None
    contexts = _contexts(common, theirs)
    if read(records):
        shifts = [_Context(c.weight, c.value - c.dense) for c in contexts]
        return _estimate(_mean_nll(shifts), contexts, common)
    best = sum(c.weight * c.dense for c in contexts) / sum(c.weight for c in contexts)
    if not best > 0:
        return None
    middle, low, high = ratio_of_sums([c.weight * c.value for c in contexts], [c.weight * c.dense for c in contexts])
    if low == high:
        other, score = wilson(0, len(contexts))[1], middle * best
        low, high = middle * (1 - other), (score + other * (1 - score)) / best
    return _estimate((middle, low, high), contexts, common)


def by_part(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by part, in the order in which parts came."""
    parts: dict[str, list[Record]] = {}
    for record in records:
        parts.setdefault(record.part, []).append(record)
    return parts


def read(records: Sequence[Record]) -> bool:
    """Whether texts were read, so that a perplexity was measured, and lower is better."""
    return records[0].nll is not None if records else False


def _contexts(records: Sequence[Record], dense: dict[tuple[str, int | None], Record] | None = None) -> list[_Context]:
    """The contexts of every part, with whole numbers as weights: sums of right answers are exact."""
    parts = [_by_sample(part) for part in by_part(records).values()]
    common = math.lcm(*map(len, parts))
    pieces: dict[str, list[_Context]] = {}
    for part in parts:
        for turns in part:
            piece = _Context(
                common // len(part),
                statistics.fmean(_number(r) for r in turns),
                statistics.fmean(_number(dense[r.sample, r.turn]) for r in turns) if dense else 0.0,
            )
            pieces.setdefault(turns[0].sample, []).append(piece)
    return [_together(each) for each in pieces.values()]


def _together(pieces: Sequence[_Context]) -> _Context:
    """One context that has turns in several parts."""
    if len(pieces) == 1:
        return pieces[0]
    weight = sum(piece.weight for piece in pieces)
    value, dense = (sum(p.weight * getattr(p, name) for p in pieces) / weight for name in ("value", "dense"))
    return _Context(weight, value, dense)


def _by_sample(records: Iterable[Record]) -> list[list[Record]]:
    samples: dict[str, list[Record]] = {}
    for record in records:
        samples.setdefault(record.sample, []).append(record)
    return list(samples.values())


def _number(record: Record) -> float:
    value = record.score if record.nll is None else record.nll
    return math.nan if value is None else value


def _mean_nll(contexts: Sequence[_Context]) -> tuple[float, float, float]:
    drawn = ratio_of_sums([c.weight * c.value for c in contexts], [c.weight for c in contexts])
    middle, low, high = (math.exp(min(nats, HIGHEST)) for nats in drawn)
    return middle, low, high


def _estimate(
    interval: tuple[float, float, float], contexts: Sequence[_Context], records: Sequence[Record]
) -> Estimate:
    return Estimate(*interval, contexts=len(contexts), answers=len(records))
