"""Prompts of an analysis: pieces of a text, rows of a JSON file, LongBench's fields; cut in the middle."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

from kvcompile.analysis.prompts import prompts
from kvcompile.config.schema import PromptsConfig
from kvcompile.errors import KvcompileError

TOKENIZER = tiny_tokenizer()
LONG = 10**6
TWO_WIKI = "KVCOMPILE_2WIKI"  # names a file of 2WikiMultihopQA, in LongBench's shape or with its passages


def words(start: int, count: int) -> str:
    return " ".join(f"w{4 + (start + i) % 120}" for i in range(count))


def file(folder: Path, name: str, rows: list[dict[str, object]]) -> str:
    path = folder / name
    path.write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)))
    return str(path)


def test_pieces_of_a_text_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(words(0, 100))
    pieces = prompts(TOKENIZER, PromptsConfig(str(path), count=3, tokens=33), LONG)
    assert [len(p.ids) for p in pieces] == [33] * 3
    ids = [i for p in pieces for i in p.ids]
    assert ids[:33] == TOKENIZER(words(0, 33))["input_ids"]
    assert len(set(ids)) == 99, "the text has no word twice"
    with pytest.raises(KvcompileError, match=r"3 prompts of 34 tokens, a.txt has 100\. Fix: prompts.tokens=33"):
        prompts(TOKENIZER, PromptsConfig(str(path), count=3, tokens=34), LONG)


def test_a_prompt_is_never_longer_than_the_model_knows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(words(0, 100))
    (piece,) = prompts(TOKENIZER, PromptsConfig(str(path), count=1, tokens=90), longest=50)
    assert len(piece.ids) == 50


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_longbench_rows_lose_the_middle_of_their_context(tmp_path: Path, name: str) -> None:
    row: dict[str, object] = {"context": words(0, 60), "input": "w120 w121", "answers": ["w9"], "dataset": "2wiki"}
    source = file(tmp_path, name, [row])
    wanted = PromptsConfig(source, count=1, tokens=30, template="w122 {context} w123 {input} w124")
    (prompt,) = prompts(TOKENIZER, wanted, LONG)
    text = TOKENIZER.decode(prompt.ids)
    assert text == f"w122 {words(0, 13)} {words(48, 12)} w123 w120 w121 w124"
    assert (prompt.question, prompt.answers) == ("w120 w121", ("w9",))
    assert TOKENIZER.decode(prompt.ids[: prompt.context]).endswith("w123")


def test_passages_keep_the_gold_ones(tmp_path: Path) -> None:
    gold = [{"title": "w4", "text": "w5"}, {"title": "w6", "text": "w7"}]
    others = [{"title": "w100", "text": words(10 * i, 8)} for i in range(4)]
    source = file(tmp_path, "a.jsonl", [{"input": "w120", "gold": gold, "distractors": others, "answers": ["w7"]}])
    wanted = PromptsConfig(source, count=1, tokens=30, template="{context} {input}")
    (prompt,) = prompts(TOKENIZER, wanted, LONG)
    text = TOKENIZER.decode(prompt.ids)
    assert "w4 w5" in text
    assert "w6 w7" in text
    assert text.count("w100") == 2
    assert prompt == prompts(TOKENIZER, wanted, LONG)[0]


def test_a_row_of_one_text_is_read_as_it_is(tmp_path: Path) -> None:
    source = file(tmp_path, "a.jsonl", [{"input": words(0, 9), "outputs": ["w4"]}, {"text": words(3, 5)}])
    first, second = prompts(TOKENIZER, PromptsConfig(source, count=2), LONG)
    assert TOKENIZER.decode(first.ids) == words(0, 9)
    assert first.answers == ("w4",)
    assert TOKENIZER.decode(second.ids) == words(3, 5)
    assert second.context == 5


def test_a_context_may_hold_what_the_template_fills_in(tmp_path: Path) -> None:
    source = file(tmp_path, "a.jsonl", [{"context": "w5 {input} w6", "input": "w7"}])
    (prompt,) = prompts(TOKENIZER, PromptsConfig(source, count=1, template="{context} {input}"), LONG)
    assert TOKENIZER.decode(prompt.ids) == "w5 <unk> w6 w7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken", "must be a JSON list, or one JSON object a line"),
        ("[1]", "every row must be a JSON object, got row 1, a int"),
        ('{"title": "x"}', "a.jsonl 1 must hold context and input, or a text, got title"),
        ('{"text": ""}', "a.jsonl 1 must hold a text, got none"),
        ("", "prompts.count must be the number of rows, or less, got 1 of 0 in a.jsonl"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(KvcompileError) as error:
        prompts(TOKENIZER, PromptsConfig(str(path), count=1), LONG)
    assert message in str(error.value)


@pytest.mark.skipif(not os.environ.get(TWO_WIKI), reason=f"{TWO_WIKI} names no file of 2WikiMultihopQA")
def test_two_wiki_is_read_as_it_is() -> None:
    wanted = PromptsConfig(os.environ[TWO_WIKI], count=5, tokens=2000)
    for prompt in prompts(TOKENIZER, wanted, LONG):
        assert prompt.answers
        assert prompt.question
        assert 100 < prompt.context < len(prompt.ids) <= 2000
