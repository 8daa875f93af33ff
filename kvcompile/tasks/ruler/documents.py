"""RULER's questions about documents (`qa_1`: SQuAD, `qa_2`: HotpotQA): the right ones among others of the same file.

Source: RULER, arXiv 2404.06654, section 3; `qa.py` of its code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from kvcompile.analysis.files import parsed
from kvcompile.errors import KvcompileError, wrapped_errors
from kvcompile.tasks.ruler.base import Subtask
from kvcompile.tasks.ruler.wording import DOCUMENTS, Draft

SHAPES = (
    "a file of SQuAD (`data`), HotpotQA (question, answer, context), LongBench (input, answers, context) "
    "or with passages (input, answers, gold, distractors)"
)
_PASSAGE = re.compile(r"^Passage \d+:\n", re.MULTILINE)


@dataclass(frozen=True)
class Asked:
    """A question, its answers, the documents that are needed, and those that come first of the others."""

    question: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class Documents(Subtask):
    """One question, and all documents of its file to draw from."""

    asked: Asked
    documents: tuple[str, ...]

    @property
    def least(self) -> int:
        """The documents that are needed."""
        return len(self.asked.needed)

    def draft(self, rng: Random, size: int, tokens: int) -> Draft:
        """size: documents. Where the file has fewer, all of them come, over and over."""
        asked, more = self.asked, size - self.least
        if size >= len(self.documents):
            chosen = list(self.documents) * -(-size // len(self.documents))
            del chosen[size:]
        elif more <= len(asked.near):
            chosen = [*asked.needed, *rng.sample(asked.near, more)]
        else:
            first = [*asked.needed, *asked.near]
            others = sorted(set(self.documents).difference(first))
            chosen = first + rng.sample(others, size - len(first))
        rng.shuffle(chosen)
        context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(chosen, 1))
        return DOCUMENTS.draft(context, asked.answers, query=asked.question)


def read(path: str, option: str, samples: int) -> list[Documents]:
    """The first `samples` questions of a file.

    Raises KvcompileError for a file that is not of one of the known shapes, or has fewer.
    """
    file = Path(path).expanduser()
    data = parsed(file, option)
    with wrapped_errors(f"{option}: {file.name} cannot be read", f"give {SHAPES}"):
        asked = list(_squad(data) if "data" in data else map(_asked, data))
    if len(asked) < samples:
        raise KvcompileError(
            f"tasks.ruler: samples must be at most the questions of {file.name}", samples, f"{len(asked)}"
        )
    documents = tuple(sorted({document for each in asked for document in (*each.needed, *each.near)}))
    return [Documents(each, documents) for each in asked[:samples]]


def _squad(data: Mapping[str, Any]) -> Iterator[Asked]:
    for article in data["data"]:
        paragraphs = dict.fromkeys(str(p["context"]) for p in article["paragraphs"])
        for p in article["paragraphs"]:
            others = tuple(text for text in paragraphs if text != p["context"])
            for qa in p["qas"]:
                if not qa.get("is_impossible", False):
                    answers = tuple(str(a["text"]) for a in qa["answers"])
                    yield Asked(str(qa["question"]), answers, (str(p["context"]),), others)


def _asked(row: Mapping[str, Any]) -> Asked:
    if "gold" in row:
        near = _titled((p["title"], p["text"]) for p in row.get("distractors") or ())
        return Asked(row["input"], _texts(row["answers"]), _titled((p["title"], p["text"]) for p in row["gold"]), near)
    if "question" in row:
        needed = _titled((title, "".join(lines)) for title, lines in row["context"])
        return Asked(row["question"], (str(row["answer"]),), needed)
    passages = [text.strip() for text in _PASSAGE.split(row["context"])]
    return Asked(row["input"], _texts(row["answers"]), _texts(filter(None, passages)))


def _titled(passages: Iterator[tuple[str, str]] | Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"{title}\n{text}" for title, text in passages))


def _texts(items: Sequence[Any] | Any) -> tuple[str, ...]:
    return tuple(map(str, items))
