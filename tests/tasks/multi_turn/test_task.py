"""Task `multi_turn`: all that is asked is hidden in the context, and the turns come in an order of their own."""

from __future__ import annotations

import re

import pytest
from tasks.characters import Characters

from kvcompile.errors import KvcompileError
from kvcompile.tasks.multi_turn.task import MultiTurn

TOKENIZER = Characters()


def test_every_answer_is_in_the_context_once_and_in_no_question() -> None:
    samples = MultiTurn(turns=6, samples=3).make_samples(TOKENIZER, 4096)
    assert [sample.part for sample in samples] == ["reference"] * 3 + ["library"] * 3
    kinds = set()
    for sample in samples:
        context = TOKENIZER.decode(sample.context)
        assert sample.chained
        assert len(sample.context) + len(sample.turns[0].ids) <= 1024
        for number, turn in enumerate(sample.turns):
            question = TOKENIZER.decode(turn.ids)
            assert len(re.findall(rf"\b{turn.answers[0]}\b", context)) == 1
            assert turn.answers[0] not in question
            assert question.startswith("\n") == (number > 0), "the border of the context is in it"
            kinds.add((number, turn.answers[0].isdigit()))
    assert len(kinds) > 6 + 3, "what is asked first differs from context to context"


def test_scores_are_shown_turn_by_turn() -> None:
    task = MultiTurn(samples=1)
    sample = task.make_samples(TOKENIZER, 4096)[0]
    assert [task.part(sample, i) for i in range(2)] == ["turn 1", "turn 2"]


def test_an_answer_is_a_whole_word_or_number() -> None:
    task = MultiTurn(samples=1)
    sample = task.make_samples(TOKENIZER, 4096)[0]
    for turn in sample.turns:
        answer = turn.answers[0]
        assert task.score(f" {answer.upper()}.", turn, sample) == 1
        assert task.score(f" {answer}s", turn, sample) == 0


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(KvcompileError, match="turns must be 2 to 20, got 21"):
        MultiTurn(turns=21)
    with pytest.raises(KvcompileError, match="needs more tokens, got 128"):
        MultiTurn(tokens=128).make_samples(TOKENIZER, 4096)
    with pytest.raises(KvcompileError, match="the 1,100 tokens that the model knows"):
        MultiTurn().make_samples(TOKENIZER, 1100)
