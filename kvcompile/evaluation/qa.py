"""Question answering over long contexts, in LongBench's shape: files as they are, prompts that fit, token F1."""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompile.errors import KvcompileError
from kvcompile.evaluation.needle import common_prefix

TEMPLATE = (
    "Here are some passages.\n\n{context}\n\nAnswer the question from the passages. "
    "Give only the answer, in as few words as possible.\n\nQuestion: {input}\nAnswer:"
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> list[str]:
    """The words that count: lower case, without punctuation and the articles a, an, the."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(prediction: str, reference: str) -> float:
    """F1 of two multisets of words, 0 to 1: with m words in both, P = m / |prediction|, R = m / |reference|,

        F1 = 2 P R / (P + R), 0 where m = 0.

    Source: LongBench, arXiv 2308.14508 (its `qa_f1_score`), after SQuAD, arXiv 1606.05250.
    """
    said, wanted = normalized(prediction), normalized(reference)
    both = (Counter(said) & Counter(wanted)).total()
    return 2 * both / (len(said) + len(wanted)) if both else 0.0


def best_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 against the reference that fits best, 0 to 1."""
    return max(f1(prediction, reference) for reference in references)


def first_line(text: str) -> str:
    """The first line of an answer that says anything."""
    return (text.lstrip().splitlines() or [""])[0]


@dataclass(frozen=True)
class Passage:
    """A titled paragraph; `needed` to answer the question, or there to distract."""

    title: str
    text: str
    needed: bool


@dataclass(frozen=True)
class Question:
    """A question, every wording of its right answer, and what it is asked about: a text, or passages."""

    text: str
    answers: tuple[str, ...]
    context: str = ""
    passages: tuple[Passage, ...] = ()


def read(path: str | Path) -> list[Question]:
    """The questions of a JSON (a list) or JSONL file, one object each: `input`, `answers` and `context`.

    In place of `context` there may be `gold` and `distractors`, lists of paragraphs with `title` and `text`.
    Raises KvcompileError for a file that cannot be read, and for an object without these fields.
    """
    shape = "a file of questions must be JSON or JSONL, each an object with input, answers and context"
    try:
        text = Path(path).read_text(encoding="utf-8")
        whole = text.lstrip()[:1] == "["
        rows = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise KvcompileError(shape, f"{str(path)!r} ({error})") from error
    try:
        questions = [_question(row) for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise KvcompileError(shape, f"{str(path)!r} ({type(error).__name__}: {error})") from error
    if not questions:
        raise KvcompileError(shape, f"{str(path)!r}, which holds none")
    return questions


def _question(row: dict[str, Any]) -> Question:
    answers = tuple(str(answer) for answer in row["answers"])
    if not answers or isinstance(row["answers"], str):
        raise TypeError("answers must be a list of one or more")
    if "context" in row:
        return Question(str(row["input"]), answers, str(row["context"]))
    groups = [(row["gold"], True), (row["distractors"], False)]
    passages = [Passage(str(p["title"]), str(p["text"]), needed) for group, needed in groups for p in group]
    return Question(str(row["input"]), answers, "", tuple(passages))


@dataclass(frozen=True)
class QaTask:
    """The first `samples` questions of a file, as prompts of at most `tokens` tokens.

    A context that is too long loses its middle, as in LongBench. Of passages, those that are needed and as many others
    as fit are shuffled by `seed`. template: holds `{context}` and, behind it, `{input}`. chat: as one turn of the
    tokenizer's chat template, where it has one. first_line: score no more than the first line of an answer.
    Raises KvcompileError for values out of range.
    """

    source: str
    tokens: int = 2048
    samples: int = 20
    seed: int = 0
    template: str = TEMPLATE
    chat: bool = True
    first_line: bool = False
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise KvcompileError(f"qa {name} must be 1 or more", getattr(self, name))
        if not 0 <= self.template.find("{context}") < self.template.find("{input}"):
            raise KvcompileError("a qa template must hold {context} and, behind it, {input}", repr(self.template))

    def prompts(self, tokenizer: Any) -> list[QaPrompt]:
        """The prompts, the same for the same task, file and tokenizer.

        Raises KvcompileError for a file with fewer questions, and for `tokens` too few for a question.
        """
        questions = read(self.source)
        if len(questions) < self.samples:
            raise KvcompileError("qa samples must be in the file", self.samples, f"{len(questions)} or fewer")
        return [self._prompt(tokenizer, question, i) for i, question in enumerate(questions[: self.samples])]

    def score(self, prediction: str, prompt: QaPrompt) -> float:
        """F1 of what a model said, 0 to 1."""
        return best_f1(first_line(prediction) if self.first_line else prediction, prompt.answers)

    def _prompt(self, tokenizer: Any, question: Question, number: int) -> QaPrompt:
        def ids(context: str, asked: str = question.text) -> list[int]:
            return self._rendered(tokenizer, context, asked)

        room = self.tokens - len(ids(""))
        context = self._context(tokenizer, question, room, number)
        while (excess := len(ids(context)) - self.tokens) > 0:
            room -= excess
            if room <= 0:
                raise KvcompileError("a qa prompt needs more tokens", self.tokens, f"{self.tokens + excess} or more")
            context = self._context(tokenizer, question, room, number)
        return QaPrompt(ids(context), question.answers, common_prefix(ids(context), ids(context, "")))

    def _rendered(self, tokenizer: Any, context: str, asked: str) -> list[int]:
        text = self.template.replace("{input}", asked).replace("{context}", context)
        if self.chat and getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": text}]
            whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            return list(tokenizer(whole, add_special_tokens=False)["input_ids"])
        return list(tokenizer(text)["input_ids"])

    def _context(self, tokenizer: Any, question: Question, room: int, number: int) -> str:
        text = question.context
        if question.passages:
            text = _joined(_fitting(tokenizer, question.passages, room, random.Random(f"{self.seed}/{number}")))
        return without_middle(tokenizer, text, room)


@dataclass(frozen=True)
class QaPrompt:
    """Token ids of one prompt and the right answers to it. context: how many of the ids stand before the question."""

    ids: list[int]
    answers: tuple[str, ...]
    context: int


def without_middle(tokenizer: Any, text: str, tokens: int) -> str:
    """The text as far as it fits into `tokens` tokens: as many of its first as of its last."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= tokens:
        return text
    tail = max(0, tokens) // 2
    head = max(0, tokens) - tail
    return str(tokenizer.decode(ids[:head])) + str(tokenizer.decode(ids[len(ids) - tail :]))


def _fitting(tokenizer: Any, passages: Sequence[Passage], room: int, rng: random.Random) -> list[Passage]:
    """Those that are needed and as many others, in a drawn order, as fit; shuffled."""
    chosen = [p for p in passages if p.needed]
    others = [p for p in passages if not p.needed]
    rng.shuffle(others)
    for passage in others:
        if len(tokenizer(_joined([*chosen, passage]), add_special_tokens=False)["input_ids"]) <= room:
            chosen.append(passage)
    rng.shuffle(chosen)
    return chosen


def _joined(passages: Sequence[Passage]) -> str:
    return "\n\n".join(f"Passage {i}:\n{p.title}\n{p.text}" for i, p in enumerate(passages, 1))
