"""LMBA: how many tokens hold most of a layer's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.analysis.layers import LayerBudgets

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class LMBA(LayerBudgets):
    """How many tokens hold `mass` of a layer's attention, by layer and head (ZigZagKV, arXiv 2412.09036, figure 2).

    MBA = min{ |S| : sum_{j in S} a_j >= mass * sum_j a_j }, LMBA_l = mean over the heads of layer l; unpooled.
    mass: share of the attention that the tokens must hold.
    """

    name: ClassVar[str] = "lmba"
    summary: ClassVar[str] = "how many tokens hold most of each layer's attention (ZigZagKV's LMBA)"
    mass: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.mass < 1, "mass", "in (0, 1)")

    def budgets(self, attention: Tensor, seen: Observation) -> tuple[Tensor, Tensor]:
        """MBA of every row; a layer's is the mean over its heads."""
        from kvcompile.policies.zigzag import minimal_budget

        rows = attention.mean(1, keepdim=True) if self.heads == "kv" else attention
        heads = minimal_budget(rows.flatten(0, 1), self.mass).double()
        return heads.mean(0), heads

    def definition(self) -> str:
        """What LMBA is."""
        return (
            f"LMBA: the least number of tokens that hold {self.mass:.0%} of {self.which()}, mean over the heads of a "
            "layer. A layer with a sliding window sees that alone."
        )
