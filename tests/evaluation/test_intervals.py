"""Protects the intervals in tables."""

from __future__ import annotations

import pytest

from kvcompile.evaluation.intervals import mean, ratio, ratio_of_sums, standard_error, wilson


def test_intervals_are_those_of_the_books() -> None:
    assert wilson(19, 20) == pytest.approx((0.7639, 0.9911), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    for count in range(1, 60):
        assert wilson(0, count)[0] == 0.0
        assert wilson(count, count)[1] == 1.0
    middle, low, high = ratio([1.1, 1.3, 1.2], [1.0, 1.0, 1.0])
    assert middle == pytest.approx(2.718281828**0.2)
    assert 1 < low < middle < high


def test_the_interval_of_a_mean_holds_it_and_is_the_same_each_time() -> None:
    values = [0.0, 1.0, 0.5, 0.25]
    middle, low, high = mean(values)
    assert middle == 0.4375
    assert 0 <= low < middle < high <= 1
    assert mean(values) == (middle, low, high)
    assert mean([0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_a_standard_error_is_that_of_the_means_of_groups() -> None:
    assert standard_error([[1.0], [2.0], [3.0], [4.0]]) == pytest.approx((2.5, 0.6455), abs=1e-4)
    assert standard_error([[0.0, 2.0], [2.0], [3.0, 3.0, 3.0], [4.0]]) == standard_error([[1.0], [2.0], [3.0], [4.0]])
    assert standard_error([[1.0, 2.0]]) == (1.5, 0.0)


def test_a_ratio_of_sums_draws_pairs() -> None:
    assert ratio_of_sums([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == (0.5, 0.5, 0.5)  # every pair has the same ratio
    middle, low, high = ratio_of_sums([0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0])
    assert middle == pytest.approx(2 / 3)
    assert 0 <= low < middle < high <= 1
    assert ratio_of_sums([3.0], [4.0]) == (0.75, 0.75, 0.75)
