"""What is printed of rows: scores beside the uncompressed model's, the protocol above, the numbers of a summary."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from kvcompile.tasks.rows import Record, Row, Size
from kvcompile.tasks.scores import Estimate
from kvcompile.tasks.table import Shown, show, summary, text

SMALL, WHOLE = Size(100, 40, 20, 5, 200, 100), Size(100, 200, 100, 5, 200, 100)


def row(stack: str, question: str, *scores: float) -> Row:
    size = WHOLE if stack == "dense" else SMALL
    records = tuple(Record(f"a {i}", "a", 0, size, "", score) for i, score in enumerate(scores))
    facts = {"metric": "right answers", "exact": True, "question": question, "shard": (0, 1), "records": records}
    named = {"key": stack + question, "stack": stack, "policies": {stack: {}}, "command": "", "model": "m"}
    return Row(**named, **facts, weights="w", dtype="float32", task="count", options={}, seconds=1, versions={"v": "1"})


def read(stack: str, *losses: float) -> Row:
    size = WHOLE if stack == "dense" else SMALL
    records = tuple(Record(f"a {i}", "a", None, size, nll=nll) for i, nll in enumerate(losses))
    return replace(row(stack, "hidden"), task="text", exact=False, records=records)


def shown(rows: Shown) -> list[str]:
    out = io.StringIO()
    show(rows, Console(file=out, width=160))
    return out.getvalue().splitlines()


def test_scores_stand_beside_the_uncompressed_models_with_intervals_and_bytes() -> None:
    rows = [row("dense", "hidden", 1, 1, 1, 1), row("small", "hidden", 1, 0, 1, 1)]
    lines = shown(Shown(rows, "small"))
    assert lines[0] == "small on m, float32; v 1"
    assert any(line.startswith("hidden: ") for line in lines)
    assert not any(line.startswith("seen: ") for line in lines), "what was not done is not explained"
    whole = next(line for line in lines if "all" in line.split())
    assert "75% (30-95)" in whole
    assert "100% (51-100)" in whole
    assert any("20 B, 20.0%" in line and "100 B, 100.0%" in line for line in lines)


def test_texts_have_a_ratio_and_rows_without_a_dense_one_have_none() -> None:
    rows = Shown([read("dense", 1.0, 2.0), read("small", 1.5, 2.6)], "small")
    (whole,) = (line for line in shown(rows) if "all" in line.split())
    assert "1.733 (" in whole
    assert not any("dense" in line for line in shown(Shown([read("small", 1.5, 2.5)], "small")))


def test_the_summary_has_whole_scores_and_the_share_of_bytes() -> None:
    rows = [row("dense", "seen", 1, 1), row("dense", "hidden", 1, 1), row("small", "seen", 1, 0)]
    rows += [row("small", "hidden", 0, 0), read("small", 0.0)]
    assert summary(Shown(rows, "small")) == {
        "count_seen": 0.5,
        "count_seen_dense": 1.0,
        "count_hidden": 0.0,
        "count_hidden_dense": 1.0,
        "text": 1.0,
        "kept": pytest.approx(0.2),
    }


def test_one_text_has_no_interval() -> None:
    assert text(Estimate(12.3, 12.3, 12.3, 1, 1), percent=False) == "12.3"
    assert text(Estimate(0.95, 0.76, 0.99, 20, 20), percent=True) == "95% (76-99)"
    assert text(None, percent=True) == ""
