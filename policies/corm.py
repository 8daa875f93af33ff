"""CORM: drop what no recent query found important; a threshold, no budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.policies.base import TokenPolicy

from kvcompile.selection import Allocation, LayerScores, Schedule, Scope, Score, Selection

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.observe import Observation

ROUNDING = 1e-5  # uniform attention sits exactly on the threshold, up to the float32 softmax


@dataclass(frozen=True)
class LastImportant(Score):
    """s[h, j] = true position of the last query t that found key j important; float32, exact below 2^24.

    Important: A[h, g, t, j] >= 1 / n_t for any query head g of the group, n_t = tokens that query t can see.
    Source: CORM, arXiv 2404.15949, definition of important and minor keys.
    """

    @property
    def queries(self) -> None:
        """Every query since the last look."""
        return None

    @property
    def carries(self) -> bool:
        """The position so far; 0 where no query found the key important."""
        return True

    def observe(self, seen: Observation) -> Tensor:
        """The positions with the new queries in them, `[H_kv, n]`."""
        import torch

        last = torch.zeros(seen.positions.shape, device=seen.keys.device)
        if seen.carried is not None:
            last = last.maximum(seen.carried)
        for asked, rows in seen.attention_blocks():
            visible = asked + 1
            if seen.sliding_window:
                visible = visible.clamp(max=seen.sliding_window)
            important = (rows * visible.view(-1, 1) >= 1 - ROUNDING).any(1)  # [H_kv, w, n]
            last = last.maximum((important * asked.view(-1, 1).float()).amax(1))
        return last

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`: the positions as carried."""
        if seen.carried is None:
            raise RuntimeError("importance is scored before it was observed")
        return seen.carried


@dataclass(frozen=True)
class Threshold(Allocation):
    """Every entry that was important within the last `window` queries stays: score > newest - window."""

    window: int

    @property
    def scope(self) -> Scope:
        """Heads differ."""
        return "head"

    def allot(self, layers: Sequence[LayerScores]) -> list[Tensor]:
        """Entries above the threshold, int64 `[H_kv]`; protected ones have infinite scores and count."""
        return [(layer.scores > layer.newest - self.window).sum(1) for layer in layers]


@dataclass(frozen=True)
class CORM(TokenPolicy):
    """Drop a token when none of the last `window` queries gave it at least an even share of attention.

    The last `recent` tokens always stay. What is kept depends on the input alone: memory is not bounded (2404.15949).
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
