"""A tokenizer of characters, so that what a task has hidden can be read off its samples."""

from __future__ import annotations

from collections.abc import Iterable

FIRST = "\x02"  # what a text begins with, as special tokens do


class Characters:
    """A token a character."""

    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in (FIRST if add_special_tokens else "") + text]}

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) for i in ids)
