"""Task `needle`: what is hidden is in the context, what asks for it is not, and lengths are kept."""

from __future__ import annotations

from collections import Counter

import pytest
from tasks.characters import Characters

from kvcompile.errors import KvcompileError
from kvcompile.tasks.needle import ANSWER, Needle

TOKENIZER = Characters()


def test_every_text_wording_and_length_is_a_part_with_as_many_contexts() -> None:
    samples = Needle(tokens=(1024, 1500), samples=3).make_samples(TOKENIZER, 4096)
    parts = Counter(sample.part for sample in samples)
    assert len(parts) == 2 * 2 * 2
    assert set(parts.values()) == {3}
    assert len({sample.name for sample in samples}) == len(samples) == 24
    assert samples == Needle(tokens=(1024, 1500), samples=3).make_samples(TOKENIZER, 4096), "the same each time"
    assert samples != Needle(tokens=(1024, 1500), samples=3, seed=1).make_samples(TOKENIZER, 4096)


def test_a_number_is_in_the_context_and_a_question_in_its_turn() -> None:
    for sample in Needle(forms=("four_keys", "passcode"), samples=2).make_samples(TOKENIZER, 4096):
        context = TOKENIZER.decode(sample.context)
        assert context.startswith("\x02"), "special tokens are there once"
        assert len(sample.turns) == (4 if "four_keys" in sample.part else 1)
        for turn in sample.turns:
            question = TOKENIZER.decode(turn.ids)
            assert context.count(turn.answers[0]) == 1
            assert turn.answers[0] not in question
            assert question.endswith((" is", "passcode"))
        assert len(sample.context) + len(sample.turns[0].ids) <= 1024


def test_a_whole_number_is_right() -> None:
    (sample, *_) = Needle(samples=1).make_samples(TOKENIZER, 4096)
    (turn,) = sample.turns
    said = {" {}.": 1.0, " {}0": 0.0, " not 12, {}": 1.0, "": 0.0}
    for text, score in said.items():
        assert Needle().score(text.format(turn.answers[0]), turn, sample) == score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": (32,)}, "tasks.needle: tokens must be a list of lengths of 64 or more"),
        ({"depths": (1.5,)}, "tasks.needle: depths must be a list in [0, 1]"),
        ({"haystacks": ()}, "tasks.needle: haystacks must be one or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(KvcompileError) as error:
        Needle(**options)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_what_the_model_cannot_read_is_refused() -> None:
    with pytest.raises(KvcompileError, match=f"than the 1,024 tokens that the model knows, got {1024 + ANSWER}"):
        Needle().make_samples(TOKENIZER, 1024)
    with pytest.raises(KvcompileError, match="unknown needle form"):
        Needle(forms=("rhyme",)).make_samples(TOKENIZER, 4096)
