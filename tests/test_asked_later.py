"""Protects the table of questions asked later: which cache answers which question, and which pairs are compared."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_config

from kvcompile.adapters.architectures import describe

FOLDER = str(Path(__file__).parents[1] / "benchmarks")
OURS = ("asked_later", "equal_bytes", "haystacks", "cpu_kernels")


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    import asked_later

    yield asked_later
    for name in OURS:
        sys.modules.pop(name, None)


def test_a_hidden_question_is_asked_of_the_context_and_a_seen_one_is_read_but_for_its_last_token(later: Any) -> None:
    questions = (((7, 8), ((1,),)), ((8, 9), ((2,), (3,))))
    case = later.Case("python", "magic", (4, 5, 6), questions)
    hidden, *seen = case.readings(["hidden", "seen"])
    assert (hidden.ids, hidden.questions) == ((4, 5, 6), questions)
    assert [s.ids for s in seen] == [(4, 5, 6, 7), (4, 5, 6, 8)]
    assert [s.questions for s in seen] == [(((8,), ((1,),)),), (((9,), ((2,), (3,))),)]


def record(row: str, case: int, answers: list[list[float]], held: int = 10) -> dict[str, Any]:
    return {"row": row, "case": case, "form": "magic", "answers": answers, "held": held, "dense": 80}


def test_a_row_is_compared_with_the_uncompressed_model_question_by_question(later: Any) -> None:
    dense = [record("dense", 0, [[1, 0.1], [0, 0.5]]), record("dense", 1, [[1, 0.2], [1, 0.2]])]
    ours = [record("ours", 0, [[0, 0.4], [1, 0.2]]), record("ours", 1, [[1, 0.5], [0, 0.7]])]
    line = later.line("ours", [*dense, *ours], {})
    assert line["bytes"] == "1/8.0"
    assert line["magic right % (95 %)"].startswith("50 ")
    assert line["magic, of the uncompressed"] == "1/3", "one of those it gives, and one that it does not"
    assert line["magic excess"] == "+0.200 ± 0.200", "means of 0 and 0.4 by context"


def test_questions_of_one_context_that_were_read_apart_are_matched_in_order(later: Any) -> None:
    dense = [record("dense", 0, [[1, 0.1]]), record("dense", 0, [[0, 0.9]])]
    ours = [record("ours", 0, [[1, 0.2]]), record("ours", 0, [[0, 1.0]])]
    line = later.line("ours", [*dense, *ours], {})
    assert (line["magic, of the uncompressed"], line["magic excess"]) == ("1/1", "+0.100 ± 0.000")


def test_a_row_with_nothing_measured_has_an_empty_line(later: Any) -> None:
    assert later.line("ours", [record("dense", 0, [[1, 0.1]])], {}) == {"row": "ours"}


class Asked:
    """A row whose answers are its label; `contest.dense` is all that is read of the model."""

    def __init__(self, label: str, asked: list[str]) -> None:
        self.label, self.overrides, self.asked = label, (label,), asked
        self.contest = SimpleNamespace(dense=describe(tiny_config("llama")))


def test_a_second_run_goes_on_and_without_time_counts_complete_contexts_alone(
    later: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(reading: Any, row: Asked) -> dict[str, Any]:
        row.asked.append(f"{row.label} {reading.ids[0]}")
        return {"held": 1, "answers": [[1.0, 0.1]]}

    monkeypatch.setattr(later.Reading, "of", of)
    asked: list[str] = []
    one, other = Asked("one", asked), Asked("other", asked)
    cases = [later.Case("python", "magic", (i,), (((7, 8), ((1,),)),)) for i in (4, 5)]

    def run(minutes: float, every: list[Any], rows: list[Asked]) -> list[tuple[str, int]]:
        args = SimpleNamespace(minutes=minutes, settings=["hidden"])
        records = later.measure(args, every, rows, later.Parts(tmp_path / "parts", "settings"))
        return [(r["row"], r["case"]) for r in records]

    assert run(1, cases[:1], [one, other]) == [("one", 0), ("other", 0)]
    assert run(1, cases, [one]) == [("one", 0), ("one", 1)]
    assert run(0, cases, [one, other]) == [("one", 0), ("other", 0)], "of the second context one row is missing"
    assert asked == ["one 4", "other 4", "one 5"]
    assert len(run(1, cases, [one, other])) == 4
    assert asked[3:] == ["other 5"]
