"""CORM: drop what no recent query found important; a threshold, no budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.selection import Allocation, LayerScores, Schedule, Selection, Traits
from kvcompile.policies.base import CarriedScore, TokenPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation

ROUNDING = 1e-5  # uniform attention sits exactly on the threshold, up to the float32 softmax


@dataclass(frozen=True)
class LastImportant(CarriedScore):
    """s[h, j] = true position of the last query t that found key j important, 0 for none; float32, exact below 2^24.

    Important: A[h, g, t, j] >= 1 / n_t for any query head g of the group, n_t = tokens that query t can see.
    Source: CORM, arXiv 2404.15949, definition of important and minor keys.
    """

    def update(self, state: Tensor, query_positions: Tensor, attention: Tensor, seen: Observation) -> Tensor:
        """The later one of `state` and the last of these queries."""
        visible = query_positions + 1
        if seen.sliding_window:
            visible = visible.clamp(max=seen.sliding_window)
        important = (attention * visible.view(-1, 1) >= 1 - ROUNDING).any(1)  # [H_kv, w, n]
        return state.maximum((important * query_positions.view(-1, 1).float()).amax(1))


@dataclass(frozen=True)
class Threshold(Allocation):
    """Every entry that was important within the last `window` queries stays: score > newest - window."""

    window: int

    traits = Traits(scope="head")

    def allot(self, layers: Sequence[LayerScores]) -> list[Tensor]:
        """Entries above the threshold, int64 `[H_kv]`; protected ones have infinite scores and count."""
        return [(layer.scores > layer.newest - self.window).sum(1) for layer in layers]


@dataclass(frozen=True)
class CORM(TokenPolicy):
    """Drop a token when none of the last `window` queries gave it at least an even share of attention.

    What is kept depends on the input alone: memory is not bounded (2404.15949).

    window: newest queries whose attention counts. recent: newest tokens that always stay.
    """

    name: ClassVar[str] = "corm"
    summary: ClassVar[str] = "tokens that recent queries found important, by threshold, without a budget"
    sinks: int = 0
    decode_every: int = 16
    window: int = 256
    recent: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.window >= 1, "window", "1 or more")
        self.require(self.recent >= 1, "recent", "1 or more")

    def selection(self) -> Selection:
        """A threshold in place of a budget."""
        return Selection(
            policy=self.name,
            score=LastImportant(),
            budget=None,
            allocation=Threshold(self.window),
            schedule=Schedule(self.between_chunks, self.decode_every),
            sinks=self.sinks,
            recent=self.recent,
        )
