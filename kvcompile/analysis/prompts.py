"""Prompts to analyse: the offline text, a text file, or a JSON file of texts or of LongBench's shape."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.analysis.files import read_text, rows_of
from kvcompile.analysis.parts import digest
from kvcompile.calibration.text import sentences
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.needle import common_prefix

if TYPE_CHECKING:
    from kvcompile.config.schema import PromptsConfig

OFFLINE = "the offline text"
OPTION = "prompts.source"
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
    if path.suffix not in (".json", ".jsonl"):
        return _pieces(tokenizer, read_text(path, OPTION), path.name, wanted.count, tokens)
    rows = rows_of(path, OPTION)
    if len(rows) < wanted.count:
        raise KvcompileError(
            "prompts.count must be the number of rows, or less", f"{wanted.count} of {len(rows)} in {path.name}"
        )
    wording = Wording(tokenizer, wanted.template or QUESTION, wanted.chat, tokens)
    return [wording.prompt(row, f"{path.name} {i + 1}") for i, row in enumerate(rows[: wanted.count])]


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
            text = passages(
                row,
                lambda text: self.tokens - len(self._ids(text, question, self.template)),
                lambda text: len(self.tokenizer(text, add_special_tokens=False)["input_ids"]),
            )
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


def passages(row: Mapping[str, Any], room: Callable[[str], int], length: Callable[[str], int]) -> str:
    """All `gold` passages of a row among as many `distractors` as there is room for, in an order drawn from its input.

    Args:
        row: its passages have a `title` and a `text`.
        room: tokens that a prompt has left with a context.
        length: tokens of a text.
    """
    chosen = [_passage(each) for each in row["gold"]]
    left = room("\n\n".join(chosen))
    for each in row.get("distractors") or []:
        text = _passage(each)
        left -= length(f"{text}\n\n") + 1
        if left < 0:
            break
        chosen.append(text)
    random.Random(str(row.get("input") or "")).shuffle(chosen)
    return "\n\n".join(chosen)


def _passage(passage: Mapping[str, Any]) -> str:
    return f"{passage.get('title', '')}\n{passage.get('text', '')}".strip()
