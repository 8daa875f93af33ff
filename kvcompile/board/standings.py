"""How stacks stand: quality and bytes with their intervals, shares of the dense model's, and the Pareto front."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvcompile.board.collect import Contest, contests, said_of_shards
from kvcompile.stack import discover
from kvcompile.tasks.rows import Cell, Row
from kvcompile.tasks.scores import Estimate, against_dense, by_part, mean, quality, read

KINDS = {  # of a stack, by the places that its policies take: what it is called
    frozenset[str](): "uncompressed",
    frozenset({"storage"}): "storage (fewer bits)",
    frozenset({"selection"}): "selection (fewer tokens)",
    frozenset({"selection", "storage"}): "selection and storage",
}
OTHER = "with recall or structure"
SHARD = r" '?evaluate\.shard=\d+/\d+'?"  # a standing is of all shards


@dataclass(frozen=True)
class Standing:
    """One stack in a panel.

    Attributes:
        kind: of `KINDS`, or `OTHER`.
        command: measures it again.
        share: bytes held over bytes of the uncompressed cache, in a model that runs in bfloat16. share_run: in the
            dtype it ran in.
        held: bytes of a cache in bfloat16, mean over caches; positions: beside them; tokens: of a prompt.
        score: mean score in [0, 1], or perplexity. dense: share of the dense model's score, or ratio to its perplexity.
        parts: score of every part.
        partial: which shards there are, where some are missing.
        front: no other has fewer bytes and is as good, or is better with as many.
    """

    stack: str
    kind: str
    command: str
    share: float
    share_run: float
    held: float
    positions: float
    tokens: float
    score: Estimate
    dense: Estimate | None
    parts: dict[str, float]
    seconds: float
    partial: str = ""
    front: bool = False


@dataclass(frozen=True)
class Panel:
    """One contest: standings by bytes, most first.

    Attributes:
        metric: what a score of 1 means. perplexity: texts were read, and lower is better.
        options: of the task.
    """

    model: str
    task: str
    question: str
    metric: str
    perplexity: bool
    options: Mapping[str, Any]
    standings: tuple[Standing, ...]

    @property
    def setting(self) -> str:
        """How was asked, as headings say it."""
        return "read" if self.perplexity else self.question


@dataclass(frozen=True)
class Board:
    """All panels, and sentences about what is missing, double or not comparable."""

    panels: tuple[Panel, ...]
    notes: tuple[str, ...]


def board(rows: Iterable[Row]) -> Board:
    """The standings of any rows; shards pooled, each stack once a panel."""
    groups, notes = contests(rows)
    return Board(tuple(_panel(contest) for contest in groups if contest.stacks), tuple(notes))


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of points (bytes, quality): whether none has at most its bytes and at least its quality, and one of them better.

    Equal points are all on the front. A point with a NaN is not.
    """
    return [
        not any(map(math.isnan, p)) and not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)
        for p in points
    ]


def kind(policies: Iterable[str]) -> str:
    """What a stack is by the places that its policies take; `OTHER` with one that is not installed here."""
    known = discover()
    return KINDS.get(frozenset(str(known[name].family) if name in known else name for name in policies), OTHER)


def _panel(contest: Contest) -> Panel:
    first, dense = contest.first, contest.dense
    standings = [_standing(label, cell, dense) for label, cell in contest.stacks]
    perplexity = read(first.records)
    whole = [s for s in standings if not s.partial]
    front = on_front([(s.share, -s.score.value if perplexity else s.score.value) for s in whole])
    best = {id(s) for s, on in zip(whole, front, strict=True) if on}
    ranked = [replace(s, front=id(s) in best) for s in standings]
    ranked.sort(key=lambda s: (-s.share, s.stack))
    return Panel(contest.model, contest.task, contest.question, first.metric, perplexity, first.options, tuple(ranked))


def _standing(label: str, cell: Cell, dense: Cell | None) -> Standing:
    records, sizes = cell.records, [record.size for record in cell.records]
    return Standing(
        stack=label,
        kind=kind(cell.first.policies),
        command=re.sub(SHARD, "", cell.first.command),
        share=_over(sum(s.held16 for s in sizes), sum(s.dense16 for s in sizes)),
        share_run=_over(sum(s.held for s in sizes), sum(s.dense for s in sizes)),
        held=sum(s.held16 for s in sizes) / len(sizes),
        positions=sum(s.positions for s in sizes) / len(sizes),
        tokens=sum(s.tokens for s in sizes) / len(sizes),
        score=quality(records, cell.first.exact),
        dense=_of_dense(cell, dense),
        parts={part: mean(some) for part, some in by_part(records).items()},
        seconds=sum(row.seconds for row in cell.rows),
        partial="" if cell.complete else said_of_shards(cell),
    )


def _of_dense(cell: Cell, dense: Cell | None) -> Estimate | None:
    if cell is dense:
        whole = quality(cell.records, cell.first.exact)
        return replace(whole, value=1.0, low=1.0, high=1.0)
    return against_dense(cell.records, dense.records) if dense else None


def _over(top: int, bottom: int) -> float:
    return top / bottom if bottom else math.nan
