"""LeanKV (DiffKV): each token of a KV head is held high, low or not at all, by the attention it receives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.selection import Needs, Schedule, Score, Selection, Tiers
from kvcompile.policies.base import scored_by
from kvcompile.policies.tiers import AtLeast, Portion, TieredPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class ReceivedAttention(Score):
    """Mean attention that each entry has received from the last `window` queries at or after it.

    s[h, j] = sum_{i, g} A[h, g, i, j] / (G min(n - j, W)) over the last W of n queries i and the G query heads of a KV
    head. The paper takes the maximum over the query heads; kernels add columns up over them, so that this is the mean.
    Source: DiffKV (LeanKV), arXiv 2412.03131, section 5.
    """

    window: int = 64

    @property
    def needs(self) -> Needs:
        """The mean attention of the last queries."""
        return Needs(queries=self.window, reduce="mean")

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`."""
        first = seen.query_positions[0]
        queries = (seen.tokens - seen.positions.maximum(first)).clamp(min=1)
        return seen.mean_attention() * seen.query_positions.numel() / queries


@dataclass(frozen=True)
class LeanKV(TieredPolicy):
    """Tokens that receive more attention than alpha_high / n are high, below alpha_low / n dropped, else low.

    Decided at the end of a prefill of n tokens, and at each decoded token for the weakest entry of a head: the token
    comes in high, the entry goes into the low tier or out, by the running mean of the attention that it has received
    (arXiv 2412.03131, where it is called DiffKV since). High is 8-bit keys and 4-bit values, low 4 and 2, each token
    with scales of its own.

    alpha_high, alpha_low: thresholds, times the tokens seen; the paper calibrates them for each model (0.02 and 1.0
    for Llama 3 8B, 0 and 1.0 for 70B). On the default model any pruning loses needles (`benchmarks/results/leankv.md`).
    recent: newest tokens that are always high, at most 64. sinks: first tokens that are, too (0 in the paper).
    score: name of a policy that ranks tokens, whose scores as portions of their sum decide after a prefill in place of
    the attention received (null: that).
    decode_every: 1 decides at each decoded token; n > 1 for all tokens anew every n decoded ones, and 0 never again:
    those decoded since are high.
    between_chunks: decide after each prefill chunk, not only after the last.
    """

    name: ClassVar[str] = "leankv"
    summary: ClassVar[str] = "each token in 8+4 bits, in 4+2 bits, or dropped, by the attention it receives"
    alpha_high: float = 1.0
    alpha_low: float = 0.0
    recent: int = 64
    sinks: int = 0
    score: str | None = None
    decode_every: int = 1
    between_chunks: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.alpha_low <= self.alpha_high, "alpha_low", "in [0, alpha_high]")
        self.require(1 <= self.recent <= ReceivedAttention().window, "recent", "1 to 64")
        self.require(self.sinks >= 0, "sinks", "0 or more")
        self.require(self.decode_every >= 0, "decode_every", "0 or more")

    def select(self, before: Selection | None) -> Selection:
        """Thresholds in place of a budget. Raises KvcompileError where another policy selects."""
        self.require(before is None, "score", f"of the policy before it, as score={before and before.policy}: drop it")
        received, each = ReceivedAttention(), self.decode_every == 1
        return Selection(
            policy=self.name,
            score=received if self.score is None else Portion(scored_by(self.score).score),
            budget=None,
            allocation=AtLeast(self.alpha_low),
            schedule=Schedule(self.between_chunks, 0 if each else self.decode_every),
            sinks=self.sinks,
            recent=self.recent,
            uncertainty=received if each else None,
            tiers=Tiers(alpha=self.alpha_high, prune=self.alpha_low if each else None),
        )
