"""Rows of LongBench's shape become prompts of at most so many tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvcompile.errors import KvcompileError
from kvcompile.tasks.longbench.datasets import Dataset
from kvcompile.tasks.prompt import Encoder, Prompt


@dataclass(frozen=True)
class Writer:
    """Writes prompts of at most `tokens` tokens. name: of what is written, for errors."""

    tokenizer: Any
    tokens: int
    chat: bool = False

    def encoder(self, dataset: Dataset) -> Encoder:
        """In a chat only where LongBench asks in one."""
        return Encoder(self.tokenizer, self.chat and dataset.chat)

    def prompt(self, row: Mapping[str, Any], dataset: Dataset, name: str) -> Prompt:
        """The prompt of a row.

        One that is too long loses its middle, which is that of the context. A row with passages (`gold` and
        `distractors`) has as many of the distractors as there is room for.
        Raises KvcompileError for a row without a context, or a question that leaves no room for one.
        """
        from kvcompile.analysis.prompts import passages

        encoder = self.encoder(dataset)
        before, after = dataset.parts
        question = after.format(input=str(row.get("input") or ""))

        def written(context: str) -> Prompt:
            return Prompt(before.format(context=context), question)

        if isinstance(row.get("gold"), list):
            context = passages(row, lambda text: self.tokens - len(encoder.ids(written(text))), self._length)
        elif isinstance(row.get("context"), str):
            context = row["context"]
        else:
            raise KvcompileError(f"{name} must hold a context, or gold passages", ", ".join(row) or "nothing")
        return self._cut(written(context), encoder, name)

    def _cut(self, prompt: Prompt, encoder: Encoder, name: str) -> Prompt:
        """The prompt without its middle, where it is too long: half of the tokens are its first, half its last ones.

        Only the tokens of the plain text are halved, as in LongBench, which puts what is left into a chat.
        """
        ids = encoder.ids(prompt)
        if len(ids) <= self.tokens:
            return prompt
        plain = Encoder(self.tokenizer)
        whole, context = plain.ids(prompt), plain.ids(Prompt(prompt.context, ""))
        room = self.tokens - (len(ids) - len(whole))
        while True:
            first, last = room // 2, room // 2 - (len(whole) - len(context))
            if last < 1:
                raise KvcompileError(f"{name}: tasks.longbench.tokens must leave room for a context", self.tokens)
            kept = (
                self.tokenizer.decode(part, skip_special_tokens=True) for part in (context[:first], context[-last:])
            )
            shorter = Prompt("".join(kept), prompt.question)
            over = len(encoder.ids(shorter)) - self.tokens
            if over <= 0:
                return shorter
            room -= over

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
