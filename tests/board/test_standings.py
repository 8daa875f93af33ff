"""Protects the numbers of a board: bytes, scores, shares of the dense model's, and the Pareto front, exactly."""

from __future__ import annotations

import math

import pytest
from board_rows import row

from kvcompile.board.standings import KINDS, OTHER, Standing, board, kind, on_front
from kvcompile.evaluation.intervals import wilson


def standings(*rows: object) -> dict[str, Standing]:
    (panel,) = board(rows).panels  # type: ignore[arg-type]
    return {s.stack: s for s in panel.standings}


def test_a_standing_has_bytes_score_and_share_of_dense() -> None:
    stands = standings(row(scores=[1, 1, 1, 0]), row("snapkv", [1, 0, 1, 0], 1 / 16))
    snapkv = stands["snapkv"]
    assert (snapkv.share, snapkv.share_run, snapkv.held, snapkv.positions, snapkv.tokens) == (
        1 / 16,
        1 / 16,
        400,
        400,
        100,
    )
    assert (snapkv.score.value, snapkv.score.low, snapkv.score.high) == pytest.approx((0.5, *wilson(2, 4)))
    assert snapkv.dense is not None
    assert snapkv.dense.value == pytest.approx(2 / 3)
    assert snapkv.parts == {"part 0": 1.0, "part 1": 0.0}
    assert list(stands) == ["dense", "snapkv"]  # most bytes first
    assert snapkv.command == "kvcompile evaluate=[needle] recipe=snapkv"


def test_the_command_measures_all_shards() -> None:
    line = "kvcompile evaluate=[needle] recipe=snapkv {}question=hidden"
    stands = standings(
        *(row("snapkv", [1], shard=(n, 2), command=line.format(f"evaluate.shard={n}/2 ")) for n in (0, 1))
    )
    assert stands["snapkv"].command == line.format("")


def test_a_perplexity_stands_as_a_ratio_and_less_is_better() -> None:
    rows = [row(scores=[2.0, 3.0], losses=True), row("kivi", [2.1, 3.1], 0.3, losses=True)]
    rows += [row("int8", [2.3, 3.3], 0.5, losses=True)]
    (panel,) = board(rows).panels
    dense, int8, kivi = panel.standings
    assert panel.perplexity
    assert dense.score.value == pytest.approx(math.exp(2.5))
    assert kivi.dense is not None
    assert kivi.dense.value == pytest.approx(math.exp(0.1))
    assert [s.front for s in (dense, int8, kivi)] == [True, False, True]


def test_the_front_is_exact() -> None:
    points = [(1.0, 0.9), (0.5, 0.9), (0.25, 0.8), (0.25, 0.8), (0.25, 0.7), (0.1, 0.85), (0.05, 0.1), (0.04, math.nan)]
    assert on_front(points) == [False, True, False, False, False, True, True, False]
    assert on_front([(0.5, 0.5), (0.5, 0.5)]) == [True, True]
    assert on_front([(0.5, 0.9), (0.5, 0.8)]) == on_front([(0.5, 0.9), (0.6, 0.9)]) == [True, False]
    assert on_front([]) == []


def test_a_stack_with_missing_shards_is_not_on_the_front_and_pushes_none_off() -> None:
    stands = standings(row(scores=[1, 1]), row("snapkv", [1], 0.1, shard=(0, 2)), row("adakv", [1, 0], 0.5))
    assert (stands["snapkv"].partial, stands["snapkv"].front) == ("1 of 2 shards", False)
    assert stands["adakv"].front
    assert stands["snapkv"].dense is not None
    assert stands["snapkv"].dense.contexts == 1


def test_other_options_are_another_panel_with_a_front_of_its_own() -> None:
    both = board([row("snapkv", [1], 0.1), row("adakv", [0], 0.2, options={"tokens": [9]})])
    assert [[s.front for s in panel.standings] for panel in both.panels] == [[True], [True]]
    assert len({panel.task for panel in both.panels}) == 2


def test_kinds_follow_the_places_of_policies() -> None:
    assert [kind(policies) for policies in ((), ("kivi",), ("snapkv",), ("snapkv", "kivi"))] == list(KINDS.values())
    assert kind(("quest",)) == kind(("gqa", "kivi")) == kind(("unheard_of",)) == OTHER
