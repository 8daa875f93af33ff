"""Protects how rows become prompts: the published wording, cut in the middle, in a chat where LongBench uses one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spelling import spelling

from kvcompile.errors import KvcompileError
from kvcompile.tasks.longbench.datasets import DATASETS
from kvcompile.tasks.longbench.prompts import Writer

ROW = {"context": "".join(f"Fact {i}. " for i in range(400)), "input": "Who is who?"}
QA = DATASETS["multifieldqa_en"]


def written(tokens: int, row: dict[str, Any] = ROW, name: str = "multifieldqa_en", chat: bool = False) -> str:
    writer = Writer(spelling(begin=True, chat=True), tokens, chat)
    prompt = writer.prompt(row, DATASETS[name], "row 1")
    ids = writer.encoder(DATASETS[name]).ids(prompt)
    assert len(ids) <= tokens
    return str(spelling().decode(ids))


@pytest.mark.parametrize("name", DATASETS)
def test_a_prompt_is_the_published_wording(name: str) -> None:
    template = DATASETS[name].template
    assert written(10**6, name=name) == "<s>" + template.format(**ROW)
    assert written(10**6, {"context": "{x}"}, name) == "<s>" + template.format(context="{x}", input="")


@given(tokens=st.integers(500, 2500))
def test_a_prompt_that_is_too_long_loses_its_middle(tokens: int) -> None:
    """Half of its tokens are the first of the whole prompt, half the last, as in LongBench."""
    text, whole = written(tokens).removeprefix("<s>"), QA.template.format(**ROW)
    half = tokens // 2
    assert text[: half - 1] == whole[: half - 1]
    assert text[-half:] == whole[-half:]
    assert len(text) == 2 * half - 1


def test_a_chat_is_used_where_longbench_uses_one() -> None:
    text = written(700, chat=True)
    assert text.startswith("<u>Read the following")
    assert text.endswith("Who is who?\nAnswer:</u><a>")
    assert len(text) > 690
    assert written(700, name="trec", chat=True).startswith("<s>Please determine")


def test_gold_passages_are_there_among_the_distractors_that_fit() -> None:
    gold = [{"title": f"G{i}", "text": f"Right {i}."} for i in range(2)]
    others = [{"title": f"D{i}", "text": "Wrong. " * 9} for i in range(50)]
    row = {"gold": gold, "distractors": others, "input": "Who?"}
    text = written(1000, row)
    assert all(f"G{i}\nRight {i}." in text for i in range(2))
    assert 1 < text.count("Wrong. Wrong") < 50
    assert len(text) > 1000 - 80
    assert written(1000, row) == text


def test_rows_without_a_context_and_questions_without_room_are_refused() -> None:
    with pytest.raises(KvcompileError, match="row 1 must hold a context, or gold passages, got title"):
        written(500, {"title": "x"})
    with pytest.raises(KvcompileError, match=r"row 1: tasks\.longbench\.tokens must leave room for a context, got 200"):
        written(200)
