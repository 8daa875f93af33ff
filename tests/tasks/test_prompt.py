"""Protects prompts as tokens: context and turn are together exactly the prompt, and the turn begins at the question."""

from __future__ import annotations

import pytest
from spelling import spelling
from tiny import tiny_tokenizer

from kvcompile.errors import KvcompileError
from kvcompile.tasks.prompt import Encoder, Prompt

PROMPT = Prompt("A text.\n", "What is it?", " It is")


@pytest.mark.parametrize("begin", [False, True])
def test_a_prompt_is_parted_where_its_question_begins(begin: bool) -> None:
    tokenizer = spelling(begin)
    context, turn = Encoder(tokenizer).parted(PROMPT)
    assert [*context, *turn] == tokenizer("A text.\nWhat is it? It is")["input_ids"]
    assert tokenizer.decode(context, skip_special_tokens=True) == "A text.\n"
    assert tokenizer.decode(turn) == "What is it? It is"
    assert (context[0] == 0) == begin


def test_in_a_chat_the_answer_begins_after_the_template() -> None:
    """The template brings its own first token, and trims what is said."""
    tokenizer = spelling(begin=True, chat=True)
    context, turn = Encoder(tokenizer, chat=True).parted(Prompt("A text.\n", "What is it?\n", " It is"))
    assert tokenizer.decode(context) == "<u>A text.\n"
    assert tokenizer.decode(turn) == "What is it?</u><a> It is"


def test_a_token_across_the_border_belongs_to_the_turn() -> None:
    tokenizer = tiny_tokenizer()
    context, turn = Encoder(tokenizer).parted(Prompt("w5 w1", "2 w7"))
    assert tokenizer.decode(context) == "w5"
    assert tokenizer.decode(turn) == "w12 w7"


def test_a_chat_needs_a_template() -> None:
    with pytest.raises(KvcompileError, match="chat must be false for a tokenizer without a chat template"):
        Encoder(spelling(), chat=True).ids(PROMPT)
