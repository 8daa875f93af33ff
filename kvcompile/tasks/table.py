"""Rows as tables on a terminal, the protocol above them, and as the few numbers of a sweep's summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.markup import escape

from kvcompile.models.provenance import in_words
from kvcompile.report.units import size
from kvcompile.tasks import scores
from kvcompile.tasks.rows import Cell, Record, Row, cells
from kvcompile.tasks.scores import PROTOCOL, Estimate
from kvcompile.tasks.stacks.naming import DENSE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kvcompile.config import sweep

READ, WHOLE = "read", "all"  # headings of a text that is read, and of all parts


@dataclass(frozen=True)
class Shown:
    """The rows of a job. stack: the one that is asked; the others are the uncompressed model's."""

    rows: Sequence[Row]
    stack: str

    @property
    def cells(self) -> list[Cell]:
        """Of the stack, in order."""
        return [cell for cell in cells(self.rows) if cell.first.stack == self.stack]

    def dense(self, cell: Cell) -> Cell | None:
        """What the uncompressed model says to the same."""
        if cell.first.stack == DENSE:
            return None
        same = (cell.first.task, cell.first.options, cell.first.question, cell.first.shard[1])
        for other in cells(self.rows):
            row = other.first
            if row.stack == DENSE and (row.task, row.options, row.question, row.shard[1]) == same:
                return other
        return None


def show(rows: Shown, console: Console) -> None:
    """Print the protocol, and a table for each task."""
    first = rows.rows[0]
    facts = f"{first.model}, {first.dtype}; {in_words(first.versions)}"
    console.print(f"[bold]{escape(rows.stack)}[/bold] on {escape(facts)}", highlight=False, soft_wrap=True)
    used = {cell.first.question for cell in rows.cells}
    for key, line in PROTOCOL.items():
        if key not in ("seen", "hidden") or key in used:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for name in dict.fromkeys(cell.first.task for cell in rows.cells):
        console.print(_table(rows, [cell for cell in rows.cells if cell.first.task == name]))


def _table(rows: Shown, asked: Sequence[Cell]) -> Table:
    """Scores of one task by part and whole: a column for each setting of the question, and for the dense model's."""
    from rich.table import Table

    first = asked[0].first
    shard = "" if first.shard == (0, 1) else f", shard {first.shard[0]} of {first.shard[1]}"
    contexts = len({record.sample for record in asked[0].records})
    table = Table(title=f"{first.task}: {first.metric}, {contexts} contexts{shard}", title_justify="left")
    table.add_column("part")
    columns: list[tuple[str, Cell, Cell | None]] = []
    for cell in asked:
        heading = READ if scores.read(cell.records) else cell.first.question
        dense = rows.dense(cell)
        columns.append((heading, cell, None))
        if dense is not None:
            columns.append((f"{heading}, dense", dense, None))
            if scores.read(cell.records):
                columns.append(("ratio", cell, dense))
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    percent = not scores.read(asked[0].records)
    for part in (*scores.by_part(asked[0].records), WHOLE):
        table.add_row(part, *(text(_estimate(cell, dense, part), percent) for _, cell, dense in columns))
    table.add_section()
    table.add_row("bytes held", *(_bytes(cell) if dense is None else "" for _, cell, dense in columns))
    return table


def _estimate(cell: Cell, dense: Cell | None, part: str) -> Estimate | None:
    """What one field of a table says; with `dense`, against that."""

    def of(every: Cell) -> list[Record]:
        return [record for record in every.records if part in (record.part, WHOLE)]

    if dense is not None:
        return scores.against_dense(of(cell), of(dense))
    return scores.quality(of(cell), cell.first.exact)


def text(estimate: Estimate | None, percent: bool) -> str:
    """`95% (76-99)`, or `12.3 (11.9-12.8)`; a single text has no interval, and nothing is said of nothing."""
    if estimate is None:
        return ""
    if estimate.low == estimate.high:
        return f"{estimate.value:.0%}" if percent else f"{estimate.value:.4g}"
    if percent:
        return f"{estimate.value:.0%} ({100 * estimate.low:.0f}-{100 * estimate.high:.0f})"
    return f"{estimate.value:.4g} ({estimate.low:.4g}-{estimate.high:.4g})"


def _bytes(cell: Cell) -> str:
    held, dense = (sum(getattr(r.size, name) for r in cell.records) for name in ("held16", "dense16"))
    return f"{size(held / len(cell.records))}, {held / dense:.1%}"


def summary(rows: Shown) -> dict[str, sweep.Cell]:
    """The whole scores of the stack, for the summary of a sweep: `needle_hidden`, `needle_hidden_dense`, `kept`."""
    return dict(_numbers(rows))


def _numbers(rows: Shown) -> Iterator[tuple[str, float]]:
    for cell in rows.cells:
        name = cell.first.task if scores.read(cell.records) else f"{cell.first.task}_{cell.first.question}"
        yield name, scores.quality(cell.records, cell.first.exact).value
        dense = rows.dense(cell)
        if dense is not None:
            yield f"{name}_dense", scores.quality(dense.records, dense.first.exact).value
    sizes = [record.size for cell in rows.cells for record in cell.records]
    yield "kept", sum(each.held16 for each in sizes) / sum(each.dense16 for each in sizes)
