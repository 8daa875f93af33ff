"""Protects questions about documents: the needed ones are there, numbered, among others; files of four shapes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvcompile.errors import KvcompileError
from kvcompile.tasks.ruler.documents import read

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {"context": "Mice eat.", "qas": [
                    {"question": "Who eats?", "answers": [{"text": "Mice"}, {"text": "mice"}], "is_impossible": False},
                    {"question": "Who sleeps?", "answers": [], "is_impossible": True},
                ]},
                {"context": "Cats sleep.", "qas": []},
            ]
        },
        {"paragraphs": [{"context": f"Dogs bark {i}.", "qas": []} for i in range(6)]
                       + [{"context": "Owls see.", "qas": [{"question": "Who?", "answers": [{"text": "Owls"}]}]}]},
    ]
}  # fmt: skip
HOTPOT = [
    {"question": f"Q{i}?", "answer": f"A{i}", "context": [[f"T{i}", ["One. ", "Two."]], [f"U{i}", ["Three."]]]}
    for i in range(3)
]
LONGBENCH = [
    {"input": f"Q{i}?", "answers": [f"A{i}", "a"], "context": f"Passage 1:\nT{i}\nOne.\n\nPassage 2:\nU{i}\nTwo.\n"}
    for i in range(3)
]
PASSAGES = [
    {"input": f"Q{i}?", "answers": [f"A{i}"], "gold": [{"title": f"T{i}", "text": "One."}],
     "distractors": [{"title": f"D{i}{j}", "text": "No."} for j in range(2)]}
    for i in range(3)
]  # fmt: skip
DOCUMENT = re.compile(r"^Document (\d+):\n", re.MULTILINE)


def written(folder: Path, data: Any) -> str:
    path = folder / "questions.json"
    path.write_text(json.dumps(data))
    return str(path)


def documents(context: str) -> list[str]:
    _, *parts = DOCUMENT.split(context.split("The following are given documents.\n\n")[1].removesuffix("\n\n"))
    assert [int(number) for number in parts[::2]] == list(range(1, len(parts) // 2 + 1))
    return [text.strip() for text in parts[1::2]]


@pytest.mark.parametrize(
    ("data", "needed"),
    [
        (HOTPOT, {"T0\nOne. Two.", "U0\nThree."}),
        (LONGBENCH, {"T0\nOne.", "U0\nTwo."}),
        (PASSAGES, {"T0\nOne."}),
    ],
)
def test_needed_documents_come_among_others(tmp_path: Path, data: Any, needed: set[str]) -> None:
    first = read(written(tmp_path, data), "tasks.ruler.hotpotqa", 3)[0]
    for seed in range(5):
        draft = first.draft(Random(seed), first.least + 2, 4096)
        texts = documents(draft.prompt.context)
        assert needed <= set(texts)
        assert len(texts) == len(set(texts)) == len(needed) + 2
        assert draft.prompt.question.endswith("words.\n\nQuestion: Q0?")
        assert draft.prompt.start == " Answer:"
        assert draft.answers[0] == "A0"
    assert (draft.wording.any, draft.wording.tokens) == (True, 32)


def test_paragraphs_of_the_same_article_come_before_others(tmp_path: Path) -> None:
    mice, owls = read(written(tmp_path, SQUAD), "tasks.ruler.squad", 2)
    assert mice.asked.answers == ("Mice", "mice")
    assert set(documents(mice.draft(Random(0), 2, 4096).prompt.context)) == {"Mice eat.", "Cats sleep."}
    assert len(set(documents(owls.draft(Random(0), 8, 4096).prompt.context))) == 8
    again = documents(owls.draft(Random(0), 12, 4096).prompt.context)
    assert (len(again), len(set(again))) == (12, 9), "a file that is too short begins again"


def test_files_of_other_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KvcompileError, match=r"ruler\.squad: questions\.json cannot be read.*Fix: give a file"):
        read(written(tmp_path, [{"title": 1}]), "tasks.ruler.squad", 1)
    with pytest.raises(KvcompileError, match=r"at most the questions of questions\.json, got 9\. Fix: 3"):
        read(written(tmp_path, HOTPOT), "tasks.ruler.hotpotqa", 9)
