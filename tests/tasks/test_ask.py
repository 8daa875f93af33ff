"""Protects how samples are asked: as `generate` goes on over the cache of a compiled model, seen, hidden, in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from contract_table import dense
from tiny import tiny_ids

from kvcompile.analysis.compare.contest import Contest, Runner
from kvcompile.analysis.compare.entry import Entry
from kvcompile.compiler import compile
from kvcompile.models.sharing import shared
from kvcompile.tasks.ask import Respondent
from kvcompile.tasks.base import Sample, Task, Turn

CONTEXT, *ASKED = (tuple(tiny_ids(1, n, seed=n)[0].tolist()) for n in (61, 5, 7))
STACK = "keydiff budget=0.3"


class Numbers:
    """Tokens are written as their ids."""

    eos_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class Count(Task):
    name: ClassVar[str] = "count"
    summary: ClassVar[str] = "numbers said"
    exact: ClassVar[bool] = False

    def score(self, said: str, turn: Turn, sample: Sample) -> float:
        return len(said.split()) / turn.tokens


def turns(*lengths: int) -> tuple[Turn, ...]:
    return tuple(Turn(ids, ("",), n) for ids, n in zip(ASKED, lengths, strict=True))


@pytest.fixture(scope="module", params=["alone", "contest"])
def respondent(request: pytest.FixtureRequest) -> Respondent:
    """A compiled model by itself, and one that shares its prefill with others."""
    if request.param == "contest":
        runner = Contest(dense(), Numbers(), kernels="sdpa").runner(Entry(STACK))
    else:
        model = compile(shared(dense()), "keydiff", ["budget=0.3", "kernels=sdpa"])
        runner = Runner(model.kvcompile.plan, model, None)
    return Respondent(runner, Numbers(), frozenset())


@torch.inference_mode()
def by_hand(*pieces: tuple[int, ...], last: int) -> str:
    """What the stack says after pieces, of which each is a prompt of its own, the first one the context."""
    model, cache = compile(shared(dense()), "keydiff", ["budget=0.3", "kernels=sdpa"]), None
    for piece in pieces:
        out = model(torch.tensor([piece], dtype=torch.int64, device="cpu"), past_key_values=cache)
        cache = out.past_key_values
    said = []
    while len(said) < last:
        said.append(int(out.logits[0, -1].argmax()))
        out = model(torch.tensor([[said[-1]]], dtype=torch.int64, device="cpu"), past_key_values=cache)
    return " ".join(map(str, said))


def test_hidden_questions_come_as_the_next_turn_each_over_a_copy(respondent: Respondent) -> None:
    records = respondent.ask(Count(), Sample("a", "p", CONTEXT, turns(4, 3)), "hidden")
    assert [r.said for r in records] == [by_hand(CONTEXT, ASKED[0], last=4), by_hand(CONTEXT, ASKED[1], last=3)]
    assert [(r.turn, r.score, r.size.tokens) for r in records] == [(0, 1.0, 61), (1, 1.0, 61)]


def test_seen_questions_are_in_the_cache_but_for_their_last_token(respondent: Respondent) -> None:
    records = respondent.ask(Count(), Sample("a", "p", CONTEXT, turns(4, 3)), "seen")
    wanted = [by_hand((*CONTEXT, *ids[:-1]), ids[-1:], last=n) for ids, n in zip(ASKED, (4, 3), strict=True)]
    assert [r.said for r in records] == wanted
    assert [r.size.tokens for r in records] == [61 + 4, 61 + 6]


def test_chained_turns_meet_the_answers_before_them(respondent: Respondent) -> None:
    first, second = respondent.ask(Count(), Sample("a", "p", CONTEXT, turns(4, 3), chained=True), "hidden")
    answer = tuple(map(int, first.said.split()))
    pieces = [CONTEXT, ASKED[0], *((token,) for token in answer[:-1])]
    assert first.said == by_hand(CONTEXT, ASKED[0], last=4)
    assert second.said == by_hand(*pieces, ASKED[1], last=3)


def test_what_follows_a_context_is_scored_token_by_token(respondent: Respondent) -> None:
    (record,) = respondent.ask(Count(), Sample("a", "p", CONTEXT, rest=ASKED[1]), "hidden")
    model, losses = compile(shared(dense()), "keydiff", ["budget=0.3", "kernels=sdpa"]), []
    with torch.inference_mode():
        cache = model(torch.tensor([CONTEXT], dtype=torch.int64, device="cpu")).past_key_values
        for token, wanted in zip(ASKED[1], ASKED[1][1:], strict=False):
            logits = model(torch.tensor([[token]], dtype=torch.int64, device="cpu"), past_key_values=cache).logits
            losses.append(-logits[0, -1].log_softmax(-1)[wanted])
    assert record.nll == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert record.turn is None
    assert record.score is None


def test_sizes_are_those_of_the_live_cache(respondent: Respondent) -> None:
    (record,) = respondent.ask(Count(), Sample("a", "p", CONTEXT, turns(1, 1)[:1]), "hidden")
    entries = 4 * 2 * 18  # layers, heads, 30 % of 61 tokens
    assert record.size.held == entries * 2 * 16 * 4
    assert record.size.held16 == entries * 2 * 16 * 2
    assert record.size.positions == entries * 4
    assert record.size.dense == 2 * record.size.dense16 == 4 * 2 * 61 * 2 * 16 * 4
