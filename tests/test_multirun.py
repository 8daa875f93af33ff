"""Sweeps: no job's result is lost, whatever happens to the others; the summary tells all."""

from __future__ import annotations

import csv
import os
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kvcompile.errors import KvcompileError
from kvcompile.multirun import RESULT, Done, SweepFolder, collect, rows_of, run_job, summarise, write_summary


def good() -> Done:
    return "outputs/x", {"needle": 0.75, "budget": 3, "note": None}


def wrong() -> Done:
    raise KvcompileError("budget must be small", 7, "make it small")


def broken() -> Done:
    raise RuntimeError("first line\nsecond line")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    run_job(tmp_path / "0", 0, ["recipe=zigzag", "budget=0.5"], good)
    run_job(tmp_path / "1", 1, ["recipe=zigzag", "budget=7"], wrong)
    run_job(tmp_path / "10", 10, ["recipe=zigzag", "+extra=[a,b]"], broken)
    return tmp_path


def test_every_job_leaves_a_result(sweep: Path) -> None:
    results = collect(sweep)
    assert [(r.job, r.status) for r in results] == [(0, "ok"), (1, "failed"), (10, "failed")]
    assert results[0].summary["needle"] == 0.75
    assert results[1].error == "budget must be small, got 7. Fix: make it small."
    assert results[2].error == "RuntimeError: first line"


def test_a_job_whose_process_died_counts_as_failed(tmp_path: Path) -> None:
    def die() -> Done:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(tmp_path / "0", 0, ["recipe=zigzag"], die)
    (lost,) = collect(tmp_path)
    assert (lost.status, lost.error) == ("failed", "the process ended before the job did")


def test_results_of_an_earlier_sweep_in_the_folder_are_not_counted(sweep: Path) -> None:
    os.utime(sweep / "10" / RESULT, (1e9, 1e9))
    assert [r.job for r in collect(sweep, since=1.5e9)] == [0, 1]


def test_rows_have_one_column_per_override_and_measure(sweep: Path) -> None:
    rows = rows_of(collect(sweep))
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0]["budget"] == "0.5"
    assert rows[0]["budget (measured)"] == 3
    assert rows[2]["extra"] == "[a,b]"
    assert rows[1]["needle"] is None


def test_csv_and_markdown_hold_every_job(sweep: Path) -> None:
    results = collect(sweep)
    write_summary(results, sweep)
    with (sweep / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok", "failed", "failed"]
    assert rows[0]["needle"] == "0.75"
    markdown = (sweep / "summary.md").read_text().splitlines()
    assert len(markdown) == 2 + len(results)
    assert "| note" not in markdown[0]


def test_summarise_prints_brackets_and_errors_and_counts_failures(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SweepFolder, "current", sweep)
    monkeypatch.setattr(SweepFolder, "started", 0.0)
    out = StringIO()
    assert summarise(Console(file=out, width=160)) == (2, 3)
    text = out.getvalue()
    assert "recipe=zigzag" in text
    assert "[a,b]" in text
    assert "job 1: budget must be small, got 7. Fix: make it small." in text
    assert summarise(Console(file=out)) == (0, 0), "a summary is printed once"


def test_no_sweep_no_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SweepFolder, "current", tmp_path / "never-made")
    assert summarise(Console(file=StringIO())) == (0, 0)
