"""StreamingLLM: the first tokens and a window of the last ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from kvcompile.plan.selection import Score, Selection
from kvcompile.policies.base import SelectionPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class Recency(Score):
    """The newest entries: s[h, j] = true position of entry j."""

    comparable = True

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`."""
        return seen.positions.float()


@dataclass(frozen=True)
class Streaming(SelectionPolicy):
    """Keep `sinks` first tokens and the last `budget - sinks` (arXiv 2309.17453).

    positions: `original` keeps true positions; `compact` moves the kept tokens to positions 0..n-1, so that a stream
    may outgrow the trained length (section 3.2). The paper's code keeps 4 + 512: `budget=516`.
    """

    name: ClassVar[str] = "streaming"
    summary: ClassVar[str] = "the first tokens and a window of the last ones"
    decode_every: int = 16
    positions: Literal["original", "compact"] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.positions in ("original", "compact"), "positions", "original or compact")

    def score(self) -> Score:
        """The newest."""
        return Recency()

    def selection(self) -> Selection:
        """Sinks and newest tokens at the chosen positions."""
        return replace(super().selection(), positions=self.positions)
