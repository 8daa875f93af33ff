"""KVzip: tokens that the model looks at when it repeats the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.selection import Needs, Schedule, Score
from kvcompile.policies.base import CarriedScore, SelectionPolicy
from kvcompile.policies.replay import ReplayPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


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
class KVzip(ReplayPolicy, SelectionPolicy):
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
    normalise: bool = True
    recent: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_replay()
        self.require(self.recent >= 0, "recent", "0 or more")

    def score(self) -> Score:
        """Attention of the replay."""
        return RepeatedAttention(self.normalise)

    def schedule(self) -> Schedule:
        """After a replay."""
        return Schedule(self.between_chunks, self.decode_every, self.replay(scores=True))
