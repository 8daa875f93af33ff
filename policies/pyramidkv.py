"""PyramidKV: budgets fall linearly with depth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kvcompile.plan.selection import Allocation, Selection
from kvcompile.policies.allocation import largest_remainder
from kvcompile.policies.base import AllocationPolicy, scored_by

WINDOW = 8


@dataclass(frozen=True)
class Pyramid(Allocation):
    """Budgets fall linearly from the first selected layer to the last; their sum is exactly layers * budget.

    b = budget - floor, k_last = b / beta, k_first = 2 b - k_last, k_l = k_first - (k_first - k_last) l / (L - 1);
    layer l keeps k_l + floor. Guards of the published code: k_first <= tokens - floor (k_last takes the rest), and
    all layers alike where tokens < 2 b. Rounded by largest remainders, which conserves the sum to the token.
    Source: PyramidKV, arXiv 2406.02069, section 4.
    """

    beta: float

    def static(self, layer: int, layers: int, heads: int, budget: int, tokens: int, floor: int) -> tuple[int, ...]:
        """Tokens per head of layer number `layer`."""
        return (self.split(layers, budget, tokens, floor)[layer],) * heads

    def split(self, layers: int, budget: int, tokens: int, floor: int) -> list[int]:
        """Tokens of every layer."""
        free = budget - floor
        if layers == 1 or free <= 0 or tokens <= budget or tokens < 2 * free:
            return [min(tokens, max(budget, floor))] * layers
        last = free / self.beta
        first = 2 * free - last
        if first >= tokens - floor:
            first = tokens - floor
            last = 2 * free - first
        step = (first - last) / (layers - 1)
        return largest_remainder([first - step * place + floor for place in range(layers)], layers * budget)


@dataclass(frozen=True)
class PyramidKV(AllocationPolicy):
    """More tokens for low layers, fewer for high ones; alone, over SnapKV with the paper's window (2406.02069).

    beta: steepness; the last layer keeps 1 / beta of the mean budget beyond what always stays.
    """

    name: ClassVar[str] = "pyramidkv"
    summary: ClassVar[str] = "SnapKV scores, more budget for lower layers"
    default_score: ClassVar[str] = "snapkv"
    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.beta >= 1, "beta", "1 or more")

    def allocation(self) -> Allocation:
        """Linear in depth."""
        return Pyramid(self.beta)

    def alone(self) -> Selection:
        """SnapKV with a window of 8."""
        if self.score is not None:
            return super().alone()
        return replace(scored_by(self.default_score, window=WINDOW), policy=self.name)
