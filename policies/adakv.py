"""AdaKV: the heads of a layer compete for its budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.selection import Allocation, Demand, LayerScores, Traits
from kvcompile.policies.allocation import water_fill
from kvcompile.policies.base import AllocationPolicy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdaptiveHeads(Allocation):
    """Budgets per head from the top-(H_kv b) scores of all heads of the layer, with a safeguard.

    budget_h = (1 - safeguard) c_h + safeguard b, c_h = entries of head h among the top-(H_kv b), b = mean budget.
    Entries that tie for the last places share them evenly. Between the protected tokens and the row's length; what
    that cuts off is spread over the other heads; largest remainders make the sum exactly H_kv b.
    Source: Ada-KV, arXiv 2407.11550, algorithm 1.
    """

    safeguard: float

    traits = Traits(scope="head", traceable=True, competing=True)

    def allot(self, layers: Sequence[LayerScores]) -> list[Tensor]:
        """Tokens per head, one int64 `[H_kv]` for each layer."""
        return [self._split(layer) for layer in layers]

    def _split(self, layer: LayerScores) -> Tensor:
        import torch

        heads = layer.scores.shape[0]
        total = layer.lengths.sum().clamp(max=heads * layer.budget).view(1)
        share = (1 - self.safeguard) * hits(layer.scores, total) + self.safeguard * total / heads
        low = layer.lengths.clamp(max=layer.floor)
        return water_fill(share, torch.ones_like(share), low, layer.lengths, total)

    def most(self, layers: Sequence[Demand]) -> list[int]:
        """The budget."""
        return [min(layer.budget, layer.tokens) for layer in layers]


def hits(scores: Tensor, places: Tensor) -> Tensor:
    """How many of the `places [1]` highest `scores [H_kv, n]` each row has, float64 `[H_kv]`; ties share the last."""
    import torch

    flat = scores.flatten()
    if torch.compiler.is_compiling():  # a trace cannot read `places` back; a sort takes ten times as long
        cut = flat.sort(descending=True).values.gather(0, (places - 1).clamp(min=0))
    else:
        cut = flat.kthvalue(flat.numel() - max(int(places), 1) + 1).values
    above, level = (scores > cut).sum(1).double(), (scores == cut).sum(1).double()
    return above + level * (places - above.sum()) / level.sum()


@dataclass(frozen=True)
class AdaKV(AllocationPolicy):
    """Split each layer's budget over its KV heads by their scores, any score (arXiv 2407.11550).

    safeguard: share of the budget that all heads get alike.
    """

    name: ClassVar[str] = "adakv"
    summary: ClassVar[str] = "a layer's budget split over its heads by their scores"
    default_score: ClassVar[str] = "expected_attention"
    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.safeguard <= 1, "safeguard", "in [0, 1]")

    def allocation(self) -> Allocation:
        """By score, within each layer."""
        return AdaptiveHeads(self.safeguard)
