"""KVzip: tokens that the model looks at when it repeats the text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.plan.policy import Calibrator
from kvcompile.plan.selection import Needs, Replay, Schedule, Score
from kvcompile.policies.base import CarriedScore, SelectionPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation

CLOSING = "\n"  # between what asks for a text and the text, where no chat template says more


@dataclass(frozen=True)
class RepeatedAttention(CarriedScore):
    """s[h, j] = max over the queries i of the replay and the group of A[h, g, i, j].

    With `normalise` of A[h, g, i, j] ||W_O v_j|| / ||h_i||: how far the entry moves the state h_i that it is added to,
    as a share of that state; W_O is the part of the output projection that query head g has.
    Sources: KVzip, arXiv 2505.23416, equation 2; normalised as KVzip+ in KVzap, arXiv 2601.07891.
    """

    normalise: bool

    comparable = True

    @property
    def needs(self) -> Needs:
        """Every query of a replay once."""
        return Needs(queries=None, carries=True, norms=self.normalise, traceable=False)

    def update(self, state: Tensor, query_positions: Tensor, attention: Tensor, seen: Observation) -> Tensor:
        """The larger of what was seen so far and what these queries pay."""
        if seen.value_norms is None or seen.hidden_norms is None:
            return state.maximum(attention.amax(dim=(1, 2)))
        states = seen.hidden_norms[..., query_positions - seen.query_positions[0]]
        shares = (attention / states.unsqueeze(-1)).amax(2)  # ||W_O v|| is the same for all queries
        return state.maximum((shares * seen.value_norms).amax(1))


@dataclass(frozen=True)
class KVzip(SelectionPolicy):
    """Keep what the model looks at when it is asked to repeat the text: no question need be known (arXiv 2505.23416).

    chunk: tokens repeated at once. overlap: of those before a piece, how many show where it begins.
    prompt: asks for the first piece. later: asks for the others, before the overlap.
    chat: end the prompt as the tokenizer's chat template ends a user's turn, for models trained on it.
    ids: token ids of prompt, later, and what follows them; left empty, the tokenizer makes them.
    normalise: weigh attention by what it moves (KVzip+, arXiv 2601.07891).
    recent: newest tokens always kept.
    """

    name: ClassVar[str] = "kvzip"
    summary: ClassVar[str] = "tokens that the model looks at when it repeats the text, which it reads twice for that"
    between_chunks: bool = False
    chunk: int = 2048
    overlap: int = 8
    prompt: str = "Repeat the previous context exactly."
    later: str = "Repeat the part of the previous context exactly, starting with"
    chat: bool = False
    ids: list[list[int]] = field(default_factory=list)
    normalise: bool = True
    recent: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.chunk >= 1, "chunk", "1 or more")
        self.require(self.overlap >= 0, "overlap", "0 or more")
        self.require(self.recent >= 0, "recent", "0 or more")
        whole = len(self.ids) in (0, 3) and all(i >= 0 for each in self.ids for i in each)
        self.require(whole, "ids", "three lists of token ids (prompt, later, what follows), or empty")

    def score(self) -> Score:
        """Attention of the replay."""
        return RepeatedAttention(self.normalise)

    def schedule(self) -> Schedule:
        """After a replay."""
        replay = Replay(self.chunk, self.overlap, *(tuple(each) for each in self.ids))
        return Schedule(self.between_chunks, self.decode_every, replay)

    def calibrated(self, calibrator: Calibrator) -> KVzip:
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
            fix = "pass tokenizer=, or set stack.kvzip.ids"
            raise KvcompileError("kvzip needs a tokenizer for the prompts of its replay", "none", fix)
        if self.chat and getattr(tokenizer, "chat_template", None) is None:
            raise KvcompileError(
                "stack.kvzip.chat=true ends a prompt as the chat template does",
                "a tokenizer without one",
                "stack.kvzip.chat=false",
            )


def _closing(tokenizer: Any) -> str:
    """What a chat template puts between the end of a user's words and the beginning of the answer."""
    words = "these words"
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
    )
    return str(turn).rpartition(words)[2]
