"""Protects the F1 of LongBench, to the number."""

from __future__ import annotations

import pytest

from kvcompile.evaluation.qa import best_f1, f1, first_line, normalized


def test_normalizing_is_lower_case_without_punctuation_and_articles() -> None:
    assert normalized("The  cat, an owl and A-frame: theory!") == ["cat", "owl", "and", "aframe", "theory"]


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        ("Paris", "paris.", 1.0),
        ("the city of Paris", "Paris, France", 0.4),  # 1 word in both of 3 and 2: P 1/3, R 1/2
        ("new new york", "New York New York", 6 / 7),  # a multiset: new twice, york once of 3 and 4
        ("London", "Paris", 0.0),
        ("the", "a", 0.0),  # nothing is left of either
        ("", "Paris", 0.0),
    ],
)
def test_f1_is_that_of_multisets_of_words(said: str, reference: str, expected: float) -> None:
    assert f1(said, reference) == pytest.approx(expected)


def test_the_best_reference_counts() -> None:
    assert best_f1("Ann Lee", ["Lee", "Ann Lee", "Bob"]) == 1.0


def test_the_first_line_is_the_first_that_says_anything() -> None:
    assert first_line("\n Ann Lee\nand so on") == "Ann Lee"
    assert first_line(" \n") == ""
