"""Protects one prefill for many stacks and questions: what is put aside comes back, and a score is computed once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from contract_table import BITS8, KVZIP, dense, plan_of
from tiny import tiny_ids

from kvcompile.adapters.architectures import describe
from kvcompile.analysis.compare.branching import Branching, Room
from kvcompile.plan.plan import Plan
from kvcompile.plan.selection import Needs, Score
from kvcompile.policies.base import SelectionPolicy
from kvcompile.policies.snapkv import SnapKV
from kvcompile.runtime.replay import replay

IDS = tiny_ids(1, 60, seed=11)[0].tolist()
CONTEXT = 40


def snapkv(budget: float) -> Plan:
    return SnapKV(budget=budget, window=4, sinks=2).apply(describe(dense().config, "float32"))


@pytest.fixture
def reads() -> tuple[Branching, list[int]]:
    """A reader, and how many tokens it has read at each time."""
    runs, lengths = Branching(dense()), []
    extend = runs.extend
    runs.extend = lambda ids: (lengths.append(len(ids)), extend(ids))[1]
    return runs, lengths


def held(runs: Branching, plan: Plan) -> list[torch.Tensor]:
    return [x.clone() for layer in runs.branch(plan).layers for row in layer.held.rows() for x in row]


def test_what_prompts_begin_with_is_read_once_and_each_goes_its_own_way(reads: tuple[Branching, list[int]]) -> None:
    runs, lengths = reads
    prompts = [IDS[:CONTEXT], IDS[:55], [*IDS[:CONTEXT], *IDS[:9]], IDS[:CONTEXT], IDS[:55]]
    for prompt in prompts:
        runs.read(prompt, CONTEXT)
        assert runs.ids == prompt
        alone = Branching(dense())
        alone.read(prompt[:CONTEXT])
        alone.read(prompt)
        for mine, theirs in zip(held(runs, snapkv(0.4)), held(alone, snapkv(0.4)), strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(runs.logits, alone.logits)
    assert lengths == [CONTEXT, 15, 9, 15]


def test_another_context_takes_its_place(reads: tuple[Branching, list[int]]) -> None:
    runs, lengths = reads
    runs.read(IDS[:CONTEXT], CONTEXT)
    runs.read(IDS[1 : CONTEXT + 1], CONTEXT)
    runs.read(IDS[1:50], CONTEXT)
    assert lengths == [CONTEXT, CONTEXT, 9]


def test_as_many_contexts_stay_as_there_is_room_for_and_the_newest_gives_way(
    reads: tuple[Branching, list[int]],
) -> None:
    """Read in turns, the first ones are found again; the last one is read each time."""
    runs, lengths = reads
    runs.room = Room(2)
    contexts = [IDS[i : i + CONTEXT] for i in range(3)]
    for context in contexts * 2:
        runs.read(context, CONTEXT)
        assert runs.ids == context
    assert lengths == [CONTEXT] * 5  # of six, the first is there


def test_readers_in_other_bases_share_the_room_and_each_keeps_one(reads: tuple[Branching, list[int]]) -> None:
    runs, lengths = reads
    rotated = Branching(dense(), rotated=True, room=runs.room)
    runs.room.most = 3
    contexts = [IDS[i : i + CONTEXT] for i in range(3)]
    for context in contexts:
        runs.read(context, CONTEXT)
    for context in contexts:
        rotated.read(context, CONTEXT)
    assert [len(reader._aside) for reader in (runs, rotated)] == [3, 1]
    assert runs.room.taken == 4
    runs.read(contexts[0], CONTEXT)
    assert lengths == [CONTEXT] * 3


def test_what_one_stack_has_counted_no_other_one_finds(reads: tuple[Branching, list[int]]) -> None:
    """leankv counts what entries receive, tiers do not: a count of the context would not fit a longer prompt."""
    runs, _ = reads
    plans = [plan_of({name: {**BITS8, "recent": 4}}) for name in ("leankv", "tiers")]
    runs.read(IDS[:CONTEXT], CONTEXT)
    runs.branch(plans[0])
    runs.read(IDS[:55], CONTEXT)
    after = [x for layer in runs.branch(plans[1]).layers for row in layer.held.rows() for x in row]
    fresh = Branching(dense())
    fresh.read(IDS[:CONTEXT], CONTEXT)
    fresh.read(IDS[:55], CONTEXT)
    alone = [x for layer in fresh.branch(plans[1]).layers for row in layer.held.rows() for x in row]
    assert all(torch.equal(a, b) for a, b in zip(after, alone, strict=True))


CALLS: list[int] = []


@dataclass(frozen=True)
class Counted(Score):
    """Scores by the sum of the keys, and says of which layer."""

    needs = Needs()

    def score(self, seen: object) -> torch.Tensor:
        CALLS.append(seen.layer)
        return seen.keys.float().sum(-1)


@dataclass(frozen=True)
class Counting(SelectionPolicy):
    """Ranks by it."""

    name, summary = "counting", "for this test"

    def score(self) -> Score:
        return Counted()


def test_stacks_that_rank_alike_share_the_scores_until_more_is_read(reads: tuple[Branching, list[int]]) -> None:
    runs, _ = reads
    plans = [Counting(budget=budget).apply(describe(dense().config, "float32")) for budget in (0.2, 0.5)]
    runs.read(IDS[:CONTEXT])
    CALLS.clear()
    lengths = [runs.branch(plan).lengths() for plan in plans]
    assert lengths == [[[8, 8]] * 4, [[20, 20]] * 4]
    assert CALLS == [0, 1, 2, 3]
    runs.read(IDS)
    runs.branch(plans[0])
    assert CALLS == [0, 1, 2, 3] * 2


def test_scores_of_a_context_stay_with_it(reads: tuple[Branching, list[int]]) -> None:
    runs, _ = reads
    runs.room = Room(2)
    plan = Counting(budget=0.2).apply(describe(dense().config, "float32"))
    CALLS.clear()
    for start in (0, 1, 0, 1):
        runs.read(IDS[start : start + CONTEXT], CONTEXT)
        runs.branch(plan)
    assert CALLS == [0, 1, 2, 3] * 2


def test_a_text_is_repeated_once_for_all_stacks_that_ask_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other prompts, pieces or scores are another replay; so is another text."""
    pieces: list[int] = []
    inner = replay.read
    monkeypatch.setattr(replay, "read", lambda *args: (pieces.append(args[2].first), inner(*args))[1])
    runs = Branching(dense())
    runs.read(IDS[:CONTEXT])
    given = {**KVZIP, "chunk": 20}
    held(runs, plan_of({"kvzip": {**given, "budget": CONTEXT}}))  # holds all of it
    once = [held(runs, plan_of({"kvzip": {**given, "budget": budget}})) for budget in (16, 24, 16)]
    assert pieces == [0, 20]
    assert all(torch.equal(a, b) for a, b in zip(once[0], once[2], strict=True))
    held(runs, plan_of({"kvzip": {**given, "budget": 16, "normalise": False}}))
    held(runs, plan_of({"kvzip": {**given, "budget": 16, "chunk": 10}}))
    assert pieces == [0, 20, 0, 20, 0, 10, 20, 30]
    runs.read(IDS[:50])
    held(runs, plan_of({"kvzip": {**given, "budget": 16}}))
    assert pieces[8:] == [0, 20, 40]


def test_a_later_turn_repeats_what_came_since_in_every_stack_of_one_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in those whose first replay was another stack's."""
    runs = Branching(dense())
    runs.read(IDS[:CONTEXT])
    plan = plan_of({"kvzip": {**KVZIP, "budget": 16}})
    caches = [runs.branch(plan) for _ in range(2)]
    pieces: list[int] = []
    inner = replay.read
    monkeypatch.setattr(replay, "read", lambda *args: (pieces.append(args[2].first), inner(*args))[1])
    model = runs.compiled(plan)
    for cache in caches:
        model(torch.tensor([IDS[CONTEXT:]]), past_key_values=cache)
    assert pieces == [CONTEXT, CONTEXT + 16] * 2
    assert caches[0].lengths() == caches[1].lengths()
