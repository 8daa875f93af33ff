"""Prompts to analyse: the offline text, a text file, or a JSON file of texts or of LongBench's shape."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.analysis.parts import digest
from kvcompile.calibration.text import sentences
from kvcompile.errors import KvcompileError, first_line
from kvcompile.evaluation.needle import common_prefix

if TYPE_CHECKING:
    from kvcompile.config.schema import PromptsConfig

OFFLINE = "the offline text"
QUESTION = (
    "Read the following passages, then answer the question about them.\n\n{context}\n\n"
    "Answer in a few words, without an explanation.\nQuestion: {input}\nAnswer:"
)
TEXTS = ("text", "prompt", "input")  # keys of a row that is one text, best first
ANSWERS = ("answers", "outputs")


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt. context: how many of them stand before the question (all, where there is none)."""

    name: str
    ids: tuple[int, ...]
    context: int
    question: str = ""
    answers: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """A hash of the tokens."""
        return digest(self.ids)


def prompts(tokenizer: Any, wanted: PromptsConfig, longest: int) -> list[Prompt]:
    """`wanted.count` prompts of at most `wanted.tokens` tokens, and no longer than the model knows.

    Raises KvcompileError for a source that cannot be read, or has fewer.
    """
    tokens = min(wanted.tokens, longest)
    if wanted.source is None:
        return _pieces(tokenizer, " ".join(sentences()), OFFLINE, wanted.count, tokens)
    path = Path(wanted.source).expanduser()
    text = _read(path)
    if path.suffix not in (".json", ".jsonl"):
        return _pieces(tokenizer, text, path.name, wanted.count, tokens)
    rows = _rows(path, text)
    if len(rows) < wanted.count:
        raise KvcompileError(
            "prompts.count must be the number of rows, or less", f"{wanted.count} of {len(rows)} in {path.name}"
        )
    wording = Wording(tokenizer, wanted.template or QUESTION, wanted.chat, tokens)
    return [wording.prompt(row, f"{path.name} {i + 1}") for i, row in enumerate(rows[: wanted.count])]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KvcompileError(
            "prompts.source must be a text, .json or .jsonl file in UTF-8", f"{str(path)!r} ({first_line(error)})"
        ) from error


def _pieces(tokenizer: Any, text: str, name: str, count: int, tokens: int) -> list[Prompt]:
    """Pieces of a text, spread evenly over it; none shares a token with another."""
    ids: list[int] = tokenizer(text)["input_ids"]
    if len(ids) < count * tokens:
        raise KvcompileError(
            "the text must be as long as all prompts together",
            f"{count} prompts of {tokens} tokens, {name} has {len(ids)}",
            f"prompts.tokens={max(1, len(ids) // count)}, fewer prompts.count or another prompts.source",
        )
    room = len(ids) // count
    starts = [i * room for i in range(count)]
    return [Prompt(f"{name} {i + 1}", tuple(ids[s : s + tokens]), tokens) for i, s in enumerate(starts)]


def _rows(path: Path, text: str) -> list[Mapping[str, Any]]:
    """The rows of a JSON list, or of a file of one JSON object a line."""
    try:
        parsed = (
            json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(s) for s in text.splitlines() if s.strip()]
        )
    except ValueError as error:
        raise KvcompileError(
            f"{path.name} must be a JSON list, or one JSON object a line", first_line(error)
        ) from error
    for i, row in enumerate(parsed):
        if not isinstance(row, dict):
            raise KvcompileError(
                f"{path.name}: every row must be a JSON object", f"row {i + 1}, a {type(row).__name__}"
            )
    return list(parsed)


@dataclass(frozen=True)
class Wording:
    """Rows become prompts of at most `tokens` tokens: `template` around a context and a question, in a chat or not.

    A context that is too long loses its middle, as in LongBench; one that comes as `gold` and `distractors`
    (lists of passages with `title` and `text`) loses distractors instead.
    """

    tokenizer: Any
    template: str
    chat: bool
    tokens: int

    def prompt(self, row: Mapping[str, Any], name: str) -> Prompt:
        """The prompt of one row. Raises KvcompileError for a row that holds no text."""
        answers: list[object] = next((row[key] for key in ANSWERS if isinstance(row.get(key), list)), [])
        question = str(row.get("input") or "")
        if isinstance(row.get("gold"), list):
            text = self._passages(row)
        elif isinstance(row.get("context"), str):
            text = row["context"]
        else:
            plain = next((row[key] for key in TEXTS if isinstance(row.get(key), str)), None)
            if plain is None:
                keys = ", ".join(row)
                raise KvcompileError(
                    f"{name} must hold context and input, or a text", keys, f"one of {', '.join(TEXTS)}"
                )
            return self._cut(name, plain, "", "{context}", answers)
        return self._cut(name, text, question, self.template, answers)

    def _cut(self, name: str, text: str, question: str, template: str, answers: Sequence[object]) -> Prompt:
        """The prompt, with the middle of its context left out where it is too long."""
        context = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, room = self._ids(text, question, template), len(context)
        while len(ids) > self.tokens:
            room -= max(1, len(ids) - self.tokens)
            if room < 2:
                raise KvcompileError(f"{name}: prompts.tokens must leave room for a context", self.tokens)
            cut = context[: (room + 1) // 2] + context[-(room // 2) :]
            text = self.tokenizer.decode(cut, skip_special_tokens=True)
            ids = self._ids(text, question, template)
        if not ids:
            raise KvcompileError(f"{name} must hold a text", "none")
        same = common_prefix(ids, self._ids(text, "", template)) if question else len(ids)
        return Prompt(name, tuple(ids), same, question, tuple(map(str, answers)))

    def _ids(self, context: str, question: str, template: str) -> list[int]:
        parts = {"{context}": context, "{input}": question}
        text = re.sub("|".join(map(re.escape, parts)), lambda part: parts[part[0]], template)
        if not self.chat:
            return list(self.tokenizer(text)["input_ids"])
        message = [{"role": "user", "content": text}]
        said = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(said, add_special_tokens=False)["input_ids"])

    def _passages(self, row: Mapping[str, Any]) -> str:
        """All gold passages among as many distractors as there is room for, in an order drawn from the question."""
        gold = [_passage(each) for each in row["gold"]]
        others = [_passage(each) for each in row.get("distractors") or []]
        question = str(row.get("input") or "")
        room = self.tokens - len(self._ids("\n\n".join(gold), question, self.template))
        chosen = list(gold)
        for text in others:
            room -= len(self.tokenizer(f"{text}\n\n", add_special_tokens=False)["input_ids"]) + 1
            if room < 0:
                break
            chosen.append(text)
        random.Random(question).shuffle(chosen)
        return "\n\n".join(chosen)


def _passage(passage: Mapping[str, Any]) -> str:
    return f"{passage.get('title', '')}\n{passage.get('text', '')}".strip()
