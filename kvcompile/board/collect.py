"""Rows become contests: what may be compared stands together, what may not stands apart, and what is odd is said."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvcompile.board.labels import told_apart
from kvcompile.tasks.rows import Cell, Row, cells, key_of

WEIGHTS = 8  # characters of a hash that tell two models of one name apart


@dataclass(frozen=True)
class Contest:
    """One model, one task with its options, one setting of the question: all that is compared with one another.

    Attributes:
        model, task: names, with what tells them apart from others of the same name.
        stacks: what each stack is called here, and its rows.
    """

    model: str
    task: str
    stacks: tuple[tuple[str, Cell], ...]

    @property
    def first(self) -> Row:
        """One row, for what all have in common."""
        return self.stacks[0][1].first

    @property
    def question(self) -> str:
        """`seen` or `hidden`."""
        return self.first.question

    @property
    def dense(self) -> Cell | None:
        """The rows of the uncompressed model."""
        return next((cell for _, cell in self.stacks if not cell.first.policies), None)


def contests(rows: Iterable[Row]) -> tuple[list[Contest], list[str]]:
    """Contests by model, task and question, and sentences about rows that are missing, double or not comparable."""
    notes: list[str] = []
    pooled = [_one_a_shard(cell, notes) for cell in cells(rows)]
    weights = _weights([cell.first for cell in pooled], notes)
    facts = [{"dtype": cell.first.dtype, "weights": of[:WEIGHTS]} for cell, of in zip(pooled, weights, strict=True)]
    models = told_apart([(cell.first.model, fact) for cell, fact in zip(pooled, facts, strict=True)])
    tasks = told_apart([(cell.first.task, cell.first.options) for cell in pooled])
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for model, task, cell in zip(models, tasks, pooled, strict=True):
        groups.setdefault((model, task, cell.first.question), []).append(cell)
    made = [
        Contest(model, task, _stacks(group, f"{model}, {task}, {question}", notes))
        for (model, task, question), group in sorted(groups.items())
    ]
    _note_options(pooled, tasks, notes)
    for contest in made:
        if contest.stacks and contest.dense is None:
            where = f"{contest.model}, {contest.task}, {contest.question}"
            notes.append(f"{where}: no row of the uncompressed model (dense), so that nothing is a share of it.")
    return made, notes


def _weights(rows: list[Row], notes: list[str]) -> list[str]:
    """Whose weights each row counts as having.

    A rotation or a structure changes weights: artifacts, and models in memory, no longer show whose they were. Such a
    stack counts as made from the one dense model of its name and dtype, if there is one.
    """
    dense: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if not row.policies:
            dense.setdefault((row.model, row.dtype), set()).add(row.weights)
    weights, converted = [], set()
    for row in rows:
        originals = dense.get((row.model, row.dtype), set())
        if row.weights not in originals and len(originals) == 1:
            converted.add(row.stack)
            weights.append(next(iter(originals)))
        else:
            weights.append(row.weights)
    if converted:
        notes.append(
            f"{', '.join(sorted(converted))}: compared with the uncompressed model of the same name, though the "
            "weights are others, as a rotation or a structure leaves them."
        )
    return weights


def _one_a_shard(cell: Cell, notes: list[str]) -> Cell:
    """A cell with each shard once. Of several rows of a shard, as several versions write them, the first counts."""
    kept: dict[int, Row] = {}
    for row in cell.rows:
        first = kept.setdefault(row.shard[0], row)
        if first is not row and first.records != row.records:
            where = f"{row.model}, {row.task}, {row.question}, {row.stack}, shard {row.shard[0]} of {row.shard[1]}"
            notes.append(
                f"{where}: measured twice with different results (rows {first.key}, {row.key}); the first counts."
            )
    return Cell(tuple(kept.values()))


def _stacks(group: list[Cell], where: str, notes: list[str]) -> tuple[tuple[str, Cell], ...]:
    """The stacks of a contest, each once, told apart. A complete one goes before one in other shards."""
    best: dict[str, Cell] = {}
    for cell in sorted(group, key=lambda c: (not c.complete, -len(c.records))):
        identity = key_of([cell.first.stack, cell.first.policies])
        if identity in best:
            several = f"in {best[identity].first.shard[1]} and in {cell.first.shard[1]} shards"
            notes.append(f"{where}: {cell.first.stack} was measured twice, {several}; the former count.")
        else:
            best[identity] = cell
    chosen = list(best.values())
    empty = [cell.first.stack for cell in chosen if not cell.records]
    if empty:
        notes.append(f"{where}: no samples in the rows of {', '.join(empty)}.")
    labels = told_apart([(cell.first.stack, cell.first.policies) for cell in chosen])
    partial = [
        f"{label} ({said_of_shards(cell)})" for label, cell in zip(labels, chosen, strict=True) if not cell.complete
    ]
    if partial:
        notes.append(f"{where}: shards are missing of {', '.join(partial)}; the front leaves that out.")
    return tuple((label, cell) for label, cell in zip(labels, chosen, strict=True) if cell.records)


def said_of_shards(cell: Cell) -> str:
    """`3 of 4 shards`."""
    return f"{len(cell.rows)} of {cell.first.shard[1]} shards"


def _note_options(pooled: Iterable[Cell], tasks: list[str], notes: list[str]) -> None:
    labels: dict[str, set[str]] = {}
    for cell, label in zip(pooled, tasks, strict=True):
        labels.setdefault(cell.first.task, set()).add(label)
    for task, several in sorted(labels.items()):
        if len(several) > 1:
            notes.append(
                f"{task} was measured with different options, which are not compared: {', '.join(sorted(several))}."
            )
