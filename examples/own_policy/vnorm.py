"""VNorm: keep the tokens whose values are largest, which move the output most where they are attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.selection import Score
from kvcompile.policies.base import SelectionPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class ValueNorm(Score):
    """s[h, j] = ||v_j||_p."""

    power: float

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`, higher = keep."""
        return seen.values.float().norm(p=self.power, dim=-1)


@dataclass(frozen=True)
class VNorm(SelectionPolicy):
    """Keep the tokens whose values have the largest norm.

    power: of the norm.
    """

    name: ClassVar[str] = "vnorm"
    summary: ClassVar[str] = "tokens whose values have the largest norm"
    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.power > 0, "power", "above 0")

    def score(self) -> Score:
        """Norm of the values."""
        return ValueNorm(self.power)
