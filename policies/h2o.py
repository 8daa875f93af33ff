"""H2O: heavy hitters by accumulated attention, and the recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.policies.base import SelectionPolicy

from kvcompile.selection import Score

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.observe import Observation


@dataclass(frozen=True)
class AccumulatedAttention(Score):
    """s[h, j] = sum over all queries t so far of mean_g A[h, g, t, j], accumulated in float32.

    Source: H2O, arXiv 2306.14048, algorithm 1.
    """

    @property
    def queries(self) -> None:
        """Every query since the last look."""
        return None

    @property
    def carries(self) -> bool:
        """The sum so far."""
        return True

    def observe(self, seen: Observation) -> Tensor:
        """The sum with the new queries in it, `[H_kv, n]`."""
        import torch

        total = torch.zeros(seen.positions.shape, device=seen.keys.device)
        if seen.carried is not None:
            total += seen.carried
        for _, rows in seen.attention_blocks():
            total += rows.mean(1).sum(1)
        return total

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`: the sum as carried."""
        if seen.carried is None:
            raise RuntimeError("accumulated attention is scored before it was observed")
        return seen.carried


@dataclass(frozen=True)
class H2O(SelectionPolicy):
    """Keep the tokens with the most accumulated attention and the newest ones (arXiv 2306.14048).

    recent_share: share of the budget that goes to the newest tokens.
    """

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "heavy hitters by accumulated attention, and the recent tokens"
    sinks: int = 0
    decode_every: int = 16
    recent_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.recent_share < 1, "recent_share", "in [0, 1)")

    @property
    def recent(self) -> float:
        """Half of the budget."""
        return self.recent_share

    def score(self) -> Score:
        """Accumulated attention."""
        return AccumulatedAttention()
