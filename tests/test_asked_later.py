"""Protects the table of questions asked later: which cache answers which question, and which pairs are compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

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
