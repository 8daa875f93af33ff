"""H2O: heavy hitters by accumulated attention, and the recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.selection import Needs, Score
from kvcompile.policies.base import CarriedScore, SelectionPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class AccumulatedAttention(CarriedScore):
    """s[h, j] = sum over all queries t so far of mean_g A[h, g, t, j], accumulated in float32.

    Source: H2O, arXiv 2306.14048, algorithm 1.
    """

    needs = Needs(queries=None, reduce="sum", carries=True)
    comparable = True

    def update(self, state: Tensor, query_positions: Tensor, attention: Tensor, seen: Observation) -> Tensor:
        """Plus what the queries pay, averaged over the group."""
        return state + attention.mean(1).sum(1)

    def receive(self, state: Tensor, column_sums: Tensor) -> Tensor:
        """Plus what the kernel has summed."""
        return state + column_sums


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
