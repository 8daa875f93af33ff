"""Protects ROUGE-L: values by hand, and the details of the package that LongBench calls."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.tasks.longbench.rouge import common_subsequence, rouge_l


@pytest.mark.parametrize(
    ("said", "wanted", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat. a dog", "the dog sat", 0.75),  # U: the, sat, dog of 5 words said: P 3/5, R 1
        ("a a a b", "a b", 1.0),  # words count once
        ("b a", "a b", 0.5),  # one of two in order
        ("a. ", "a", 2 / 3),  # what is left after the stop is an empty word: P 1/2, R 1
        ("A", "a", 0.0),  # nothing is made lower case
        ("a,", "a", 0.0),  # and no punctuation removed
        ("", "a", 0.0),
        ("...", "a", 0.0),
        ("a\n  b", "a b", 1.0),
    ],
)
def test_values_by_hand(said: str, wanted: str, score: float) -> None:
    assert rouge_l(said, wanted) == pytest.approx(score, abs=1e-7)


def test_the_constant_of_the_package_is_in_the_score() -> None:
    assert rouge_l("a", "a") == 2 / (2 + 1e-8)


def test_of_two_sequences_that_are_as_long_the_package_takes_this_one() -> None:
    assert common_subsequence(["a", "b"], ["b", "a"]) == ["b"]


@given(a=st.text("abc", max_size=7), b=st.text("abc", max_size=7))
def test_no_common_subsequence_is_longer(a: str, b: str) -> None:
    found = "".join(common_subsequence(list(a), list(b)))
    parts = [{"".join(c) for n in range(8) for c in itertools.combinations(text, n)} for text in (a, b)]
    assert found in parts[0] & parts[1]
    assert len(found) == max(map(len, parts[0] & parts[1]))
