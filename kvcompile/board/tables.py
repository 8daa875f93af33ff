"""A board as text: a table on screen, the same in Markdown, and every number in CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from kvcompile.board.standings import Board, Panel, Standing
from kvcompile.report.markdown import inline
from kvcompile.tasks.scores import PROTOCOL, Estimate

if TYPE_CHECKING:
    from rich.console import Console

LEGEND = (
    *PROTOCOL.values(),
    "Of dense: share of the uncompressed model's score, or ratio to its perplexity, on what both were asked.",
    "Front: no other stack has at most these bytes and at least this score, one of them better.",
)
MARKS = (
    "*: on the front. Bytes: as a share of the uncompressed cache's; where a stack has two settings, the first one's."
)


@dataclass(frozen=True)
class Section:
    """One model and one task: a line a stack, its settings of the question side by side."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def together(board: Board) -> list[list[Panel]]:
    """Panels of one model and task stand together: hidden, then seen."""
    groups: dict[tuple[str, str], list[Panel]] = {}
    for panel in board.panels:
        groups.setdefault((panel.model, panel.task), []).append(panel)
    return list(groups.values())


def sections(board: Board) -> list[Section]:
    """The board, a section for each model and task, stacks by bytes, most first."""
    return [_section(panels) for panels in together(board)]


def show(board: Board, console: Console) -> None:
    """Print the board."""
    from rich.markup import escape
    from rich.table import Table

    for section in sections(board):
        grid = Table(title=escape(section.title), title_justify="left", title_style="bold")
        for place, name in enumerate(section.header):
            grid.add_column(escape(name), justify="right" if place else "left", overflow="fold")
        for line in section.lines:
            grid.add_row(*map(escape, line))
        console.print(grid)
    for sentence in (*LEGEND, MARKS, *board.notes):
        console.print(escape(sentence), highlight=False)


def markdown(board: Board) -> str:
    """The board in Markdown."""
    from tabulate import tabulate

    parts = ["# Board", "\n".join(f"- {line}" for line in (*LEGEND, MARKS))]
    parts += [f"> {inline(note)}" for note in board.notes]
    for section in sections(board):
        lines = [[inline(stack), *numbers] for stack, *numbers in section.lines]
        align = ["left"] + ["right"] * (len(section.header) - 1)
        grid = tabulate(lines, section.header, tablefmt="pipe", colalign=align, disable_numparse=True)
        parts.append(f"## {inline(section.title)}\n\n{grid}")
    return "\n\n".join(parts) + "\n"


def table(board: Board) -> str:
    """Every number as CSV, a line for each stack and panel."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header: list[str] = []
    for panel in board.panels:
        for standing in panel.standings:
            line = _flat(panel, standing)
            if not header:
                header = list(line)
                writer.writerow(header)
            writer.writerow(line.values())
    return out.getvalue()


def share(value: float) -> str:
    """Of bytes: `4.2 % (1/24)`."""
    if not value > 0:
        return "none" if value == 0 else ""
    fraction = f" (1/{1 / value:.3g})" if value < 0.4 else ""
    return f"{100 * value:.3g} %{fraction}"


def quality(estimate: Estimate, perplexity: bool) -> str:
    """A score in percent, or a perplexity, with its interval: `95 (76-99)`."""
    return _interval(estimate, "{:,.2f}", 1) if perplexity else _interval(estimate, "{:.0f}", 100)


def of_dense(estimate: Estimate | None, perplexity: bool) -> str:
    """A share in percent, or a ratio of perplexities, with its interval."""
    if estimate is None:
        return ""
    return _interval(estimate, "{:.3f}", 1) if perplexity else _interval(estimate, "{:.0f}", 100)


def _interval(estimate: Estimate, form: str, factor: float) -> str:
    value, low, high = (form.format(factor * x) for x in (estimate.value, estimate.low, estimate.high))
    return value if estimate.low == estimate.high or math.isnan(estimate.value) else f"{value} ({low}-{high})"


def _section(panels: Sequence[Panel]) -> Section:
    """panels: of one model and task; those of hidden questions first."""
    unit = "" if panels[0].perplexity else ", %"
    bytes_of: dict[str, float] = {}
    for panel in panels:
        for standing in panel.standings:
            bytes_of.setdefault(standing.stack, standing.share)
    lines = {stack: [stack, share(part)] for stack, part in sorted(bytes_of.items(), key=lambda item: -item[1])}
    header = ["stack", "bytes"]
    for panel in panels:
        header += [f"{panel.setting}{unit}", "of dense"]
        standings = {standing.stack: standing for standing in panel.standings}
        for stack, line in lines.items():
            line += _cells(standings[stack], panel.perplexity) if stack in standings else ["", ""]
    title = f"{panels[0].model}, {panels[0].task}"
    if panels[0].metric != panels[0].task:
        title += f": {panels[0].metric}"
    return Section(title, tuple(header), tuple(map(tuple, lines.values())))


def _cells(standing: Standing, perplexity: bool) -> list[str]:
    mark = f" ({standing.partial})" if standing.partial else " *" if standing.front else ""
    return [quality(standing.score, perplexity) + mark, of_dense(standing.dense, perplexity)]


def _flat(panel: Panel, standing: Standing) -> dict[str, Any]:
    dense = standing.dense
    estimates = {"score": standing.score, "dense": dense}
    line: dict[str, Any] = {
        "model": panel.model,
        "task": panel.task,
        "question": panel.question,
        "stack": standing.stack,
        "kind": standing.kind,
        "bytes_share": standing.share,
        "bytes_share_run": standing.share_run,
        "bytes": standing.held,
        "positions": standing.positions,
        "tokens": standing.tokens,
        "metric": panel.metric,
    }
    for name, estimate in estimates.items():
        for field in fields(Estimate):
            line[f"{name}_{field.name}"] = "" if estimate is None else getattr(estimate, field.name)
    line |= {"front": int(standing.front), "partial": standing.partial, "seconds": standing.seconds}
    return line | {"options": json.dumps(panel.options, sort_keys=True), "command": standing.command}
