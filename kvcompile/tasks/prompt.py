"""Prompts as token ids, as plain text or as a message in a chat, parted where the question begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcompile.errors import KvcompileError


@dataclass(frozen=True)
class Prompt:
    """A prompt as text: a `context`, the `question` about it, and the `start` of the answer that a model goes on with.

    Plain text is the three of them in a row. In a chat, context and question are the user's message, and the start
    begins the message of the assistant.
    """

    context: str
    question: str
    start: str = ""


@dataclass(frozen=True)
class Encoder:
    """Turns prompts into the tokens of a tokenizer, in its `chat` template or not."""

    tokenizer: Any
    chat: bool = False

    def ids(self, prompt: Prompt) -> list[int]:
        """The tokens of the whole prompt. Raises KvcompileError for a chat with a tokenizer that has no template."""
        return self._encoded(self._text(prompt))

    def parted(self, prompt: Prompt) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(context, turn), together exactly the tokens of `ids`.

        A token that holds the end of the context and the beginning of the question belongs to the turn.
        """
        from kvcompile.evaluation.needle import common_prefix

        text = self._text(prompt)
        border = text.rfind(prompt.question.strip()) if self.chat else len(prompt.context)
        if border < 0:
            raise KvcompileError("the chat template must leave a question as it is", repr(prompt.question))
        ids = self._encoded(text)
        context = common_prefix(ids, self._encoded(text[:border]))
        return tuple(ids[:context]), tuple(ids[context:])

    def _text(self, prompt: Prompt) -> str:
        message = prompt.context + prompt.question
        if not self.chat:
            return message + prompt.start
        if not getattr(self.tokenizer, "chat_template", None):
            raise KvcompileError("chat must be false for a tokenizer without a chat template", "true")
        said = [{"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return str(text) + prompt.start

    def _encoded(self, text: str) -> list[int]:
        """The template of a chat brings its special tokens with it."""
        return list(self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"])
