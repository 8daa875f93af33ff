"""Everything that a search tried as one HTML file: a board with a panel for each number of contexts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kvcompile.board.page import page
from kvcompile.board.standings import Board, Panel, Standing, kind, on_front
from kvcompile.evaluation.intervals import wilson
from kvcompile.searching.fit import Fitter
from kvcompile.searching.run import Result
from kvcompile.searching.study import Tried
from kvcompile.searching.wish import Score
from kvcompile.tasks.scores import Estimate

if TYPE_CHECKING:
    from kvcompile.config.schema import Config


def html(result: Result, config: Config, model: Sequence[str]) -> str:
    """The page; bytes as plans say them, quality as the search saw it.

    model: the settings that name the model on a command line.
    """
    fitter = result.fitter
    tried = [(t, s) for t in result.every for s in t.scores if s.quality is not None]
    panels = []
    for contexts in sorted({s.contexts for _, s in tried}, reverse=True):
        standings = [_standing(t, s, fitter, model) for t, s in tried if s.contexts == contexts]
        front = on_front([(s.share, s.score.value) for s in standings])
        ranked = sorted(zip(standings, front, strict=True), key=lambda pair: (-pair[0].share, pair[0].stack))
        panels.append(
            Panel(
                config.model.name,
                f"{contexts} contexts",
                config.question,
                "right answers, of the uncompressed model's",
                False,
                {"tokens": fitter.tokens},
                tuple(replace(s, front=best) for s, best in ranked),
            )
        )
    return page(Board(tuple(panels), ()))


def _standing(t: Tried, found: Score, fitter: Fitter, model: Sequence[str]) -> Standing:
    sizes, overrides = fitter.sizes(t.stack), t.stack.overrides
    kept = min(found.quality or 0.0, 1.0)
    low, high = wilson(kept * found.answers, found.answers) if found.answers else (0.0, 1.0)
    return Standing(
        stack=" ".join(overrides),
        kind=kind(t.stack.options),
        command=shlex.join(["kvcompile", *overrides, *model]),
        share=t.share,
        share_run=t.share,
        held=sizes.held,
        positions=sizes.positions,
        tokens=fitter.tokens,
        score=Estimate(kept, low, high, found.contexts, found.answers),
        dense=None,
        parts={},
        seconds=0.0,
    )
