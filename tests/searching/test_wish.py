"""Protects what is nearer to a wish: pairs on the same contexts, the front, and who climbs on."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from kvcompile.searching.wish import Score, Standing, Wish, front, ordered, score, survivors


def test_a_score_is_of_pairs_on_the_same_contexts() -> None:
    dense = [{"answers": [[1.0, 0.1], [1.0, 0.2]]}, {"answers": [[0.0, 1.0]]}, {"loss": 2.0}]
    stack = [{"answers": [[1.0, 0.2], [0.0, 0.7]]}, {"answers": [[0.0, 1.3]]}, {"loss": 2.1}]
    found = score(zip(stack, dense, strict=True))
    assert found.contexts == 2
    assert found.excess == pytest.approx((0.3 + 0.3) / 2)
    assert found.error == pytest.approx(0.0)
    assert found.quality == pytest.approx((0.5 + 0) / (1 + 0))
    assert found.perplexity == pytest.approx(math.exp(0.1))


def test_no_number_is_worse_than_any_and_nothing_right_is_no_quality() -> None:
    found = score([({"answers": [[0.0, math.nan]]}, {"answers": [[0.0, 1.0]]})])
    assert (found.excess, found.quality, found.perplexity) == (100.0, None, None)


def standing(number: int, *values: float, missed: float = 0.0) -> Standing:
    return Standing(number, missed, values)


def test_the_front_is_what_no_other_beats_and_nothing_that_misses_the_wish() -> None:
    some = [standing(0, 1, 4), standing(1, 2, 2), standing(2, 2, 3), standing(3, 4, 1), standing(4, 0, 0, missed=0.1)]
    assert [s.number for s in front(some)] == [3, 1, 0]
    assert [s.number for s in ordered(some)] == [0, 1, 3, 2, 4]


def test_the_best_third_of_all_climbs_and_of_it_those_that_wait() -> None:
    some = [standing(i, float(i)) for i in range(7)]
    assert survivors(some, [0, 2, 5], one_in=3) == [0, 2]  # three of seven
    assert survivors(some[3:], [4, 5], one_in=3) == [4]
    assert survivors([standing(9, 1.0, missed=1.0)], [9], one_in=3) == [9]  # the only one, though it misses


GOOD = Score(6, 0.1, 0.01, 0.9, 1.05)


def test_bytes_alone_leave_one_aim_and_everything_else_two() -> None:
    wish = Wish(bytes=Fraction(1, 24), perplexity=1.1)
    assert wish.values(0.04, GOOD) == [0.1]
    assert wish.constraints(1 / 24, GOOD) == pytest.approx({"bytes": 0.0, "perplexity": -0.05})
    assert Wish(quality=0.95).values(0.04, GOOD) == [0.1, 0.04]
    assert Wish(quality=0.95).constraints(0.04, GOOD) == pytest.approx({"quality": 0.05})
    assert Wish().aims == Wish(bytes=Fraction(1, 2), quality=0.9).aims == 2
    assert Wish(quality=0.95).standing(3, 0.04, GOOD).missed == pytest.approx(0.05)
    assert wish.standing(3, 1 / 24, GOOD).missed == 0


def test_few_texts_make_a_stack_miss_a_perplexity_only_where_it_is_surely_worse() -> None:
    wish = Wish(perplexity=1.1)

    def missed(*losses: float) -> float:
        asked = {"answers": [[1.0, 0.1]]}
        texts = [({"loss": loss}, {"loss": 0.0}) for loss in losses]
        return wish.constraints(0.1, score([(asked, asked), *texts]))["perplexity"]

    assert missed(0.5) < 0  # one text says nothing of others
    assert missed(0.0, 0.3) < 0
    assert missed(0.2, 0.21) > 0
    assert missed(0.0, 0.01) < 0
