"""Protects what is compared with what: shards pooled, rows once, other options apart, and every oddity said."""

from __future__ import annotations

from dataclasses import replace

from board_rows import row

from kvcompile.board.collect import contests
from kvcompile.board.labels import told_apart


def test_shards_are_pooled() -> None:
    (contest,), notes = contests([row("dense", [1, 0], shard=(1, 2), first=2), row("dense", [1, 1], shard=(0, 2))])
    ((label, cell),) = contest.stacks
    assert label == "dense"
    assert [record.sample for record in cell.records] == ["s0", "s1", "s2", "s3"]
    assert notes == []


def test_a_missing_shard_is_said() -> None:
    rows = [row(), row("snapkv", [1], 0.25, shard=(2, 4)), row("snapkv", [1], 0.25, shard=(0, 4), first=1)]
    (contest,), (note,) = contests(rows)
    assert len(contest.stacks) == 2
    assert note == (
        "SmolLM2-135M, needle, hidden: shards are missing of snapkv (2 of 4 shards); the front leaves that out."
    )


def test_a_row_of_the_same_shard_counts_once_and_a_contradiction_is_said() -> None:
    again = replace(row(scores=[1, 1]), key="b", versions={"kvcompile": "1"})
    assert contests([row(scores=[1, 1]), again])[1] == []
    (contest,), (note,) = contests([row(scores=[1, 1]), replace(row(scores=[1, 0]), key="b")])
    assert [record.score for record in contest.stacks[0][1].records] == [1, 1]
    assert "measured twice with different results" in note


def test_the_same_in_other_shards_is_not_added_up() -> None:
    half = [row("snapkv", [0], 0.25, shard=(0, 2))]
    (contest,), notes = contests([row(), *half, row("snapkv", [1, 1], 0.25)])
    (cell,) = (cell for label, cell in contest.stacks if label == "snapkv")
    assert [record.score for record in cell.records] == [1, 1]
    assert notes == ["SmolLM2-135M, needle, hidden: snapkv was measured twice, in 1 and in 2 shards; the former count."]


def test_other_options_models_and_questions_are_contests_of_their_own() -> None:
    longer = {"tokens": [2048], "seed": 0}
    rows = [row(), row(options=longer), row(question="seen"), row(dtype="bfloat16"), row(weights="f" * 16)]
    found, notes = contests(rows)
    assert [(c.model, c.task, c.question) for c in found] == sorted(
        [
            ("SmolLM2-135M (dtype=float32, weights=01234567)", "needle (tokens=[1024])", "hidden"),
            ("SmolLM2-135M (dtype=float32, weights=01234567)", "needle (tokens=[2048])", "hidden"),
            ("SmolLM2-135M (dtype=float32, weights=01234567)", "needle (tokens=[1024])", "seen"),
            ("SmolLM2-135M (dtype=bfloat16, weights=01234567)", "needle (tokens=[1024])", "hidden"),
            ("SmolLM2-135M (dtype=float32, weights=ffffffff)", "needle (tokens=[1024])", "hidden"),
        ]
    )
    assert notes == [
        "needle was measured with different options, which are not compared: "
        "needle (tokens=[1024]), needle (tokens=[2048])."
    ]


def test_converted_weights_stand_beside_the_one_model_that_they_can_come_from() -> None:
    rotated = row("snapkv_kivi", [1], 0.05, weights="f" * 16)
    (contest,), (note,) = contests([row(), row("snapkv"), rotated])
    assert {label for label, _ in contest.stacks} == {"dense", "snapkv", "snapkv_kivi"}
    assert note.startswith("snapkv_kivi: compared with the uncompressed model of the same name, though")
    several, _ = contests([row(), row(weights="a" * 16), rotated])
    assert [len(each.stacks) for each in several] == [1, 1, 1]


def test_stacks_of_one_name_are_told_apart() -> None:
    rows = [row(), *(row("snapkv", [1], n, policies={"snapkv": {"budget": n, "pool": 7}}) for n in (0.5, 0.25))]
    ((contest,), _) = contests(rows)
    assert {label for label, _ in contest.stacks} == {
        "dense",
        "snapkv (snapkv.budget=0.5)",
        "snapkv (snapkv.budget=0.25)",
    }


def test_without_a_dense_row_that_is_said_and_rows_of_no_samples_are_named() -> None:
    (contest,), notes = contests([row("snapkv", [1], 0.25), row("adakv", [], 0.25)])
    assert [label for label, _ in contest.stacks] == ["snapkv"]
    assert notes == [
        "SmolLM2-135M, needle, hidden: no samples in the rows of adakv.",
        "SmolLM2-135M, needle, hidden: no row of the uncompressed model (dense), so that nothing is a share of it.",
    ]


def test_names_that_stand_for_one_thing_stay_as_they_are() -> None:
    assert told_apart([("a", {"x": 1}), ("a", {"x": 1}), ("b", {"x": 2})]) == ["a", "a", "b"]
    assert told_apart([("a", {}), ("a", {"x": {"y": "z"}})]) == ["a", "a (x.y=z)"]
