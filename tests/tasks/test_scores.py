"""Protects what is said of rows: means of parts and contexts, intervals that turns do not narrow, pairs with dense."""

from __future__ import annotations

import math

import pytest

from kvcompile.evaluation.intervals import wilson
from kvcompile.tasks.rows import Record, Size
from kvcompile.tasks.scores import against_dense, by_part, quality

SIZE = Size(10, 1, 1, 0, 2, 2)


def said(sample: str, *scores: float, part: str = "p") -> list[Record]:
    return [Record(sample, part, turn, SIZE, "", score) for turn, score in enumerate(scores)]


def texts(*losses: float, part: str = "p") -> list[Record]:
    return [Record(f"{part} {i}", part, None, SIZE, nll=nll) for i, nll in enumerate(losses)]


def many(right: int, count: int, part: str = "p") -> list[Record]:
    return [record for i in range(count) for record in said(f"{part} {i}", float(i < right), part=part)]


def test_a_share_of_right_answers_has_wilsons_interval() -> None:
    estimate = quality(many(19, 20), exact=True)
    assert (estimate.value, estimate.contexts, estimate.answers) == (0.95, 20, 20)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(19, 20))


def test_turns_of_one_context_do_not_narrow_an_interval() -> None:
    turns = [record for i in range(5) for record in said(f"{i}", 1.0, 1.0, 1.0, float(i > 0))]
    estimate = quality(turns, exact=True)
    assert (estimate.value, estimate.contexts, estimate.answers) == (0.95, 5, 20)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(0.95 * 5, 5))


def test_a_context_with_turns_in_several_parts_counts_once() -> None:
    turns = [record for n in range(4) for i in range(5) for record in said(f"{i}", float(n > 0 or i > 0), part=f"{n}")]
    estimate = quality(turns, exact=True)
    assert (estimate.value, estimate.contexts, estimate.answers) == (0.95, 5, 20)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(0.95 * 5, 5))
    assert quality(by_part(turns)["0"], exact=True).value == 0.8


def test_parts_weigh_the_same_and_a_small_one_widens_the_interval() -> None:
    records = many(2, 2, part="small") + many(0, 18, part="large")
    estimate = quality(records, exact=True)
    assert estimate.value == pytest.approx(0.5)
    assert estimate.high - estimate.low > wilson(10, 20)[1] - wilson(10, 20)[0] + 0.1
    assert list(by_part(records)) == ["small", "large"]


@pytest.mark.parametrize("count", [3, 7, 49, 60])
def test_all_right_is_one_whatever_the_weights(count: int) -> None:
    for exact in (True, False):
        estimate = quality(many(3, 3, "a") + many(count, count, "b") + many(1, 1, "c"), exact)
        assert estimate.value == estimate.high == 1.0
        assert estimate.low < 0.9  # a bootstrap of equal scores would be certain


def test_scores_between_are_drawn_and_the_same_each_time() -> None:
    records = [record for i in range(12) for record in said(f"{i}", i / 12)]
    estimate = quality(records, exact=False)
    assert estimate == quality(records, exact=False)
    assert 0.25 < estimate.low < estimate.value < estimate.high < 0.7


def test_perplexity_is_of_the_mean_loss() -> None:
    estimate = quality(texts(1.0, 2.0, 3.0), exact=True)
    assert estimate.value == pytest.approx(math.exp(2.0))
    assert math.exp(1.0) <= estimate.low < estimate.value < estimate.high <= math.exp(3.0)
    assert quality(texts(2000.0), exact=True).value == math.exp(700)


def test_a_ratio_to_dense_pairs_contexts_and_leaves_out_what_only_one_has() -> None:
    ratio = against_dense(texts(1.1, 2.1, 3.1, 9.0), texts(1.0, 2.0, 3.0))
    assert ratio is not None
    assert ratio.contexts == 3
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx(
        [math.exp(0.1)] * 3
    )  # texts differ, the shift does not
    kept = against_dense(many(9, 30), many(18, 24))
    assert kept is not None
    assert (kept.value, kept.contexts) == (0.5, 24)
    assert 0.2 < kept.low < 0.5 < kept.high < 0.8


def test_what_never_changed_may_still_change() -> None:
    changed = 1.959964**2 / (20 + 1.959964**2)
    for right, of_dense, value in ((15, 15, 1.0), (20, 20, 1.0), (0, 15, 0.0)):
        kept, best = against_dense(many(right, 20), many(of_dense, 20)), of_dense / 20
        assert kept is not None
        high = (value * best + changed * (1 - value * best)) / best
        assert (kept.value, kept.low, kept.high) == pytest.approx((value, value * (1 - changed), high))


def test_nothing_in_common_and_a_dense_model_that_finds_nothing_give_no_share() -> None:
    assert against_dense(many(3, 4, "a"), many(3, 4, "b")) is None
    assert against_dense(many(3, 4), many(0, 4)) is None
