"""Sweeps: no job's result is lost, whatever happens to the others; the summary tells all."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kvcompile.config.sweep import (
    RESULT,
    Done,
    SweepFolder,
    collect,
    rows_of,
    run_job,
    summarise,
    summary_table,
    write_summary,
    written,
)
from kvcompile.errors import KvcompileError


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
    before = written(sweep)
    run_job(sweep / "1", 1, ["recipe=zigzag"], good)
    assert [(r.job, r.status) for r in collect(sweep, before)] == [(1, "ok")]


def test_a_job_is_done_once_for_its_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As long as what it made is there; and it counts as a job of the sweep that leaves it out."""
    calls = []

    def work() -> Done:
        calls.append(1)
        (tmp_path / "made").mkdir(exist_ok=True)
        return str(tmp_path / "made"), {"n": len(calls)}

    def again(settings: str, work: Callable[[], Done] = work) -> int:
        run_job(tmp_path / "0", 0, ["recipe=zigzag"], work, settings)
        return len(calls)

    assert again("a") == 1
    before = written(tmp_path)
    with caplog.at_level(logging.INFO):
        assert again("a") == 1
    assert "job 0 is done already" in caplog.text
    assert [r.summary for r in collect(tmp_path, before)] == [{"n": 1}]
    assert again("b") == 2, "other settings"
    (tmp_path / "made").rmdir()
    assert again("b") == 3, "what it made is gone"
    again("c", broken)
    assert again("c") == 4, "it had failed"
    (tmp_path / "0" / RESULT).write_text("{")
    assert again("c") == 5, "its result cannot be read"
    assert again("") == again("") - 1, "without settings always"


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
    monkeypatch.setattr(SweepFolder, "before", {})
    out = StringIO()
    assert summarise(Console(file=out, width=160)) == (2, 3)
    text = out.getvalue()
    assert "recipe=zigzag" in text
    assert "[a,b]" in text
    assert "job 1: budget must be small, got 7. Fix: make it small." in text
    assert summarise(Console(file=out)) == (0, 0), "a summary is printed once"


MEASURED = {
    "tokens": 1024,
    "bytes": 9437184,
    "dense_bytes": 47185920,
    "kept": 0.2,
    "needle_before": 1.0,
    "needle_after": 0.9375,
    "perplexity_before": 21.08,
    "perplexity_after": 23.41,
    "prefill_s_before": 1.912,
    "prefill_s_after": 2.013,
    "decode_tokens_s_before": 14.87,
    "decode_tokens_s_after": 18.23,
}


def printed(folder: Path, width: int) -> str:
    out = StringIO()
    Console(file=out, width=width).print(summary_table(collect(folder)))
    return out.getvalue()


def cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_a_sweep_of_compiles_is_readable_at_a_hundred_columns(tmp_path: Path) -> None:
    for job, recipe in enumerate(["expected_attention", "retrieval_heads"]):
        run = ["model=llama", f"recipe={recipe}", f"budget=0.{job + 1}5"]
        run_job(tmp_path / str(job), job, run, lambda job=job: ("out", {**MEASURED, "bytes": 9437184 + 2**20 * job}))
    text = printed(tmp_path, 100)
    assert cells(text)[1][:4] == ["1", "retrieval_heads", "0.25", "10 MiB"], "one line a job, nothing cut"
    assert len(cells(text)) == 2
    assert "1.91 > 2.01" in text
    assert text.splitlines()[0].strip() == "model=llama"
    caption = " ".join(text[text.rindex("┘") + 1 :].split())
    assert caption.startswith("status ok, tokens 1024, dense bytes 45 MiB, kept 0.2, needle 1 > 0.938")


def test_what_only_one_job_has_is_no_constant(sweep: Path) -> None:
    """One job of three succeeded: what it measured stays in its row, beside those that have nothing."""
    rows = cells(printed(sweep, 160))
    assert [row[2:] for row in rows] == [["ok", "0.75", "3", ""], ["failed", "", "", ""], ["failed", "", "", "[a,b]"]]


def test_no_sweep_no_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SweepFolder, "current", tmp_path / "never-made")
    assert summarise(Console(file=StringIO())) == (0, 0)
