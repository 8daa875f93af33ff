"""Protects question answering: the F1 of LongBench to the number, files as they are, prompts that keep the question."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from kvcompile.errors import KvcompileError
from kvcompile.evaluation.qa import QaTask, best_f1, f1, normalized, read

TWO_WIKI = "KVCOMPILE_2WIKI"


class Words:
    """Tokenizer of words and white space; with a template, a chat."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.known: list[str] = []
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        pieces = re.findall(r"\s+|\S+", text)
        for piece in pieces:
            if piece not in self.known:
                self.known.append(piece)
        return {"input_ids": [self.known.index(piece) for piece in pieces]}

    def decode(self, ids: list[int]) -> str:
        return "".join(self.known[i] for i in ids)

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return f"<user> {turns[0]['content']} <assistant> "


def file_of(path: Path, rows: list[dict], whole: bool = False) -> str:
    lines = json.dumps(rows) if whole else "\n".join(map(json.dumps, rows)) + "\n"
    path.write_text(lines, encoding="utf-8")
    return str(path)


ROW = {"input": "Who wrote it?", "context": " ".join(f"w{i}" for i in range(300)), "answers": ["Ann Lee", "A. Lee"]}


def test_normalizing_is_lower_case_without_punctuation_and_articles() -> None:
    assert normalized("The  cat, an owl and A-frame: theory!") == ["cat", "owl", "and", "aframe", "theory"]


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        ("Paris", "paris.", 1.0),
        ("the city of Paris", "Paris, France", 0.4),  # 1 word in both of 3 and 2: P 1/3, R 1/2
        ("new new york", "New York New York", 6 / 7),  # a multiset: new twice, york once of 3 and 4
        ("London", "Paris", 0.0),
        ("the", "a", 0.0),  # nothing is left of either
        ("", "Paris", 0.0),
    ],
)
def test_f1_is_that_of_multisets_of_words(said: str, reference: str, expected: float) -> None:
    assert f1(said, reference) == pytest.approx(expected)


def test_the_best_reference_counts() -> None:
    assert best_f1("Ann Lee", ["Lee", "Ann Lee", "Bob"]) == 1.0


def test_json_and_jsonl_are_read_as_they_are_fields_beyond_ours_included(tmp_path: Path) -> None:
    rows = [{**ROW, "length": 3, "dataset": "2wikimqa", "_id": "x", "all_classes": None}, {**ROW, "answers": ["B"]}]
    lines, whole = read(file_of(tmp_path / "a.jsonl", rows)), read(file_of(tmp_path / "a.json", rows, whole=True))
    assert lines == whole
    assert [q.answers for q in lines] == [("Ann Lee", "A. Lee"), ("B",)]


@pytest.mark.parametrize("row", [{"input": "?", "answers": ["x"]}, {**ROW, "answers": "x"}, {**ROW, "answers": []}, []])
def test_what_is_no_question_is_refused(tmp_path: Path, row: object) -> None:
    with pytest.raises(KvcompileError, match="JSON or JSONL"):
        read(file_of(tmp_path / "a.jsonl", [row]))


def test_a_long_context_loses_its_middle_and_the_question_stays(tmp_path: Path) -> None:
    words, task = Words(), QaTask(file_of(tmp_path / "a.jsonl", [ROW]), tokens=200, samples=1)
    (prompt,) = task.prompts(words)
    text = words.decode(prompt.ids)
    assert 195 <= len(prompt.ids) <= 200
    assert "w0 w1 " in text
    assert " w299" in text
    assert "w150" not in text
    assert text.endswith("Question: Who wrote it?\nAnswer:")
    assert "Who" not in words.decode(prompt.ids[: prompt.context])
    assert words.decode(prompt.ids[prompt.context :]).lstrip().startswith("Who wrote it?")


def test_a_short_context_is_left_whole(tmp_path: Path) -> None:
    words, task = Words(), QaTask(file_of(tmp_path / "a.jsonl", [ROW]), tokens=2000, samples=1)
    assert ROW["context"] in words.decode(task.prompts(words)[0].ids)


def test_needed_passages_stay_and_others_fill_the_room_in_an_order_of_the_seed(tmp_path: Path) -> None:
    def passages(name: str, count: int) -> list[dict[str, str]]:
        return [{"title": f"{name}{i}", "text": f"{name}{i}-text " * 8} for i in range(count)]

    row = {"input": "Q?", "answers": ["x"], "gold": passages("gold", 2), "distractors": passages("other", 40)}
    source = file_of(tmp_path / "a.jsonl", [row])

    def text(seed: int) -> str:
        words = Words()
        (prompt,) = QaTask(source, tokens=400, samples=1, seed=seed).prompts(words)
        assert 360 <= len(prompt.ids) <= 400
        return words.decode(prompt.ids)

    assert "gold0-text" in text(0)
    assert "gold1-text" in text(0)
    assert 8 <= len(re.findall(r"Passage \d+:", text(0))) <= 20
    assert text(0) == text(0) != text(1)
    assert "distractors" not in text(0)


def test_a_chat_template_is_used_where_there_is_one(tmp_path: Path) -> None:
    source = file_of(tmp_path / "a.jsonl", [ROW])
    words = Words("a template")
    (chat,), (plain,) = (QaTask(source, 200, 1, chat=chat).prompts(words) for chat in (True, False))
    assert words.decode(chat.ids).startswith("<user> ")
    assert words.decode(chat.ids).endswith("Answer: <assistant> ")
    assert not words.decode(plain.ids).startswith("<user>")


def test_the_first_line_alone_is_scored_where_asked(tmp_path: Path) -> None:
    source, said = file_of(tmp_path / "a.jsonl", [ROW]), "\nAnn Lee\nand so on"
    (prompt,) = QaTask(source, 200, 1).prompts(Words())
    assert QaTask(source, first_line=True).score(said, prompt) == 1.0
    assert QaTask(source).score(said, prompt) == pytest.approx(4 / 7)


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    source = file_of(tmp_path / "a.jsonl", [ROW])
    with pytest.raises(KvcompileError, match="needs more tokens"):
        QaTask(source, tokens=10, samples=1).prompts(Words())
    with pytest.raises(KvcompileError, match="in the file"):
        QaTask(source, samples=2).prompts(Words())
    with pytest.raises(KvcompileError, match="template"):
        QaTask(source, template="{input} {context}")


@pytest.mark.skipif(not os.environ.get(TWO_WIKI), reason=f"{TWO_WIKI} names no file of 2WikiMultihopQA")
def test_two_wiki_is_read_as_it_is() -> None:
    questions = read(os.environ[TWO_WIKI])
    assert all(q.answers and q.text and (q.context or any(p.needed for p in q.passages)) for q in questions)
