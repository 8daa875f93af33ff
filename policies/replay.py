"""What policies share that have the model read a text again: its pieces, and the words that ask for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError
from kvcompile.plan.policy import Calibrator, Policy
from kvcompile.plan.selection import Replay

if TYPE_CHECKING:
    from typing_extensions import Self

CLOSING = "\n"  # between what asks for a text and the text, where no chat template says more


@dataclass(frozen=True)
class ReplayPolicy(Policy):
    """Base of the policies whose text is read again (KVzip, arXiv 2505.23416, section 3).

    chunk: tokens repeated at once. overlap: of those before a piece, how many show where it begins.
    prompt: asks for the first piece. later: asks for the others, before the overlap.
    chat: end the prompt as the tokenizer's chat template ends a user's turn, for models trained on it.
    ids: token ids of prompt, later, and what follows them; left empty, the tokenizer makes them.
    """

    chunk: int = 2048
    overlap: int = 8
    prompt: str = "Repeat the previous context exactly."
    later: str = "Repeat the part of the previous context exactly, starting with"
    chat: bool = False
    ids: list[list[int]] = field(default_factory=list)

    def require_replay(self) -> None:
        """Range checks of these fields, for `__post_init__`."""
        self.require(self.chunk >= 1, "chunk", "1 or more")
        self.require(self.overlap >= 0, "overlap", "0 or more")
        whole = len(self.ids) in (0, 3) and all(i >= 0 for each in self.ids for i in each)
        self.require(whole, "ids", "three lists of token ids (prompt, later, what follows), or empty")

    def replay(self, scores: bool) -> Replay:
        """What is read again; whether scores see the queries of that."""
        if not self.ids:
            return Replay(self.chunk, self.overlap, scores=scores)
        first, later, closing = (tuple(each) for each in self.ids)
        return Replay(self.chunk, self.overlap, first, later, closing, scores)

    def calibrated(self, calibrator: Calibrator) -> Self:
        """The policy with its prompts as token ids; as it is, where they are given."""
        if self.ids:
            return self
        self.require_calibratable(calibrator.tokenizer)
        closing = _closing(calibrator.tokenizer) if self.chat else CLOSING
        texts = f"\n\n{self.prompt}", f"\n\n{self.later}", closing
        return replace(self, ids=[list(calibrator.tokenizer.encode(x, add_special_tokens=False)) for x in texts])

    def require_calibratable(self, tokenizer: Any) -> None:
        """Prompts are token ids. Raises KvcompileError without a tokenizer, or a chat template where that is wanted."""
        if self.ids:
            return
        if tokenizer is None:
            fix = f"pass tokenizer=, or set stack.{self.name}.ids"
            raise KvcompileError(f"{self.name} needs a tokenizer for the prompts of its replay", "none", fix)
        if self.chat and getattr(tokenizer, "chat_template", None) is None:
            raise KvcompileError(
                f"stack.{self.name}.chat=true ends a prompt as the chat template does",
                "a tokenizer without one",
                f"stack.{self.name}.chat=false",
            )


def _closing(tokenizer: Any) -> str:
    """What a chat template puts between the end of a user's words and the beginning of the answer."""
    words = "these words"
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
    )
    return str(turn).rpartition(words)[2]
