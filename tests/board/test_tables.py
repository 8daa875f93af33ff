"""Protects how a board reads: the same text each time, names that cannot break a table, every number in CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

import pytest
from board_rows import row
from rich.console import Console

from kvcompile.board.standings import Board, board
from kvcompile.board.tables import markdown, share, show, table
from kvcompile.tasks.rows import Row
from kvcompile.tasks.scores import PROTOCOL

ODD = "<script>alert(1)</script> | [red]x[/red]"


def rows() -> Iterator[Row]:
    for question, scores in (("hidden", [1, 0, 1, 0]), ("seen", [1, 1, 1, 1])):
        yield row(scores=[1] * 4, question=question)
        yield row("snapkv", scores, 1 / 16, question=question)
    yield row(ODD, [1, 1], 0.5, policies={"kivi": {}}, shard=(1, 2))
    yield row(scores=[2.0, 2.5, 3.0], losses=True)
    yield row("kivi", [2.1, 2.7, 3.1], 0.3, losses=True)


@pytest.fixture(scope="module")
def standings() -> Board:
    return board(rows())


def test_markdown_is_the_same_each_time_whatever_came_first(standings: Board) -> None:
    text = markdown(standings)
    assert text == markdown(board(reversed(list(rows()))))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "## SmolLM2-135M, needle: right answers" in lines
    assert "| stack | bytes | hidden, % | of dense | seen, % | of dense |" in lines
    assert "| dense | 100 % | 100 (51-100) * | 100 | 100 (51-100) | 100 |" in lines
    assert "| snapkv | 6.25 % (1/16) | 50 (15-85) * | 50 (0-100) | 100 (51-100) * | 100 (51-100) |" in lines
    assert any(line.startswith("| kivi | 30 % (1/3.33) | 14.15 (") for line in lines)
    assert "| stack | bytes | read | of dense |" in lines
    assert any("shards are missing of " in line for line in lines)
    assert text.count("(1 of 2 shards)") == 2
    assert all(f"- {line}" in text for line in PROTOCOL.values())


def test_names_cannot_break_the_table_or_become_markup(standings: Board) -> None:
    text = markdown(standings)
    assert ODD not in text
    assert r"\<script\>alert(1)\</script\> \| \[red\]x\[/red\]" in text
    console = Console(width=160, file=io.StringIO(), force_terminal=False)
    show(standings, console)
    assert ODD in console.file.getvalue()  # type: ignore[attr-defined]


def test_csv_has_every_number_of_every_panel(standings: Board) -> None:
    lines = list(csv.DictReader(io.StringIO(table(standings))))
    assert len(lines) == sum(len(panel.standings) for panel in standings.panels) == 7
    (snapkv,) = (line for line in lines if line["stack"] == "snapkv" and line["question"] == "hidden")
    assert float(snapkv["bytes_share"]) == 1 / 16
    assert float(snapkv["score_value"]) == float(snapkv["dense_value"]) == 0.5
    assert (snapkv["front"], snapkv["partial"], snapkv["score_contexts"]) == ("1", "", "4")
    assert {line["stack"] for line in lines} == {"dense", "snapkv", "kivi", ODD}


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "100 %"), (0.5, "50 %"), (1 / 24, "4.17 % (1/24)"), (0.0, "none"), (float("nan"), "")],
)
def test_shares_of_bytes_read_as_percent_and_fraction(value: float, text: str) -> None:
    assert share(value) == text


def test_numbers_that_are_none_are_said_to_be() -> None:
    broken = row("kivi", [float("nan")], 0.3, losses=True)
    assert " nan |" in markdown(board([row(scores=[2.0], losses=True), broken]))
