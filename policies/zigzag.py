"""ZigZagKV: layers get tokens by their uncertainty, measured on each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from kvcompile.plan.selection import Allocation, Demand, LayerScores, Scope, Selection, Traits
from kvcompile.policies.adakv import AdaptiveHeads
from kvcompile.policies.allocation import water_fill
from kvcompile.policies.base import AllocationPolicy
from kvcompile.policies.snapkv import WindowAttention

if TYPE_CHECKING:
    from torch import Tensor

Rows = Literal["layer", "head", "adaptive"]
ROUNDING = 1e-6  # relative, of a float32 softmax


def minimal_budget(mass: Tensor, share: float) -> Tensor:
    """MBA: how few entries hold `share` of each row's attention `mass [R, n]`; int64 `[R]`, at least 1.

    MBA = min{ |S| : sum_{j in S} a_j >= share * sum_j a_j }. Source: ZigZagKV, arXiv 2412.09036, definition of MBA.
    """
    running = mass.double().sort(dim=-1, descending=True).values.cumsum(-1)
    short = running < (share - ROUNDING) * running[..., -1:]
    return (short.sum(-1) + 1).clamp(max=mass.shape[-1])


@dataclass(frozen=True)
class Uncertainty(Allocation):
    """Budgets by how many tokens hold `mass` of the attention (LMBA), over a floor; the sum is exactly the total.

    MBA per KV head, of the attention averaged over its query heads and the window; LMBA_l = mean over KV heads.
    B_l = B_min + (B - B_min) L LMBA_l / sum_m LMBA_m, B_min = floor B. Clamped to what always stays and what is held;
    what that cuts off goes to the other rows in proportion to their LMBA.
    per: `layer` (all heads of a layer alike), `head` (rows are KV heads of all layers, with their own MBA) or
    `adaptive` (by layer; inside a layer the heads compete by score, see AdaKV).
    share_cap: no row gets more than this share of the total, but never less than the mean (1: no cap); lifted where
    the total cannot be spent otherwise.
    Source: ZigZagKV, arXiv 2412.09036, equation 6; `head`, `adaptive` and the cap are ours.
    """

    mass: float
    floor: float
    per: Rows
    share_cap: float
    safeguard: float = 0.2

    @property
    def traits(self) -> Traits:
        """All layers at once; their heads compete where they are adaptive."""
        scope: Scope = "layer" if self.per == "layer" else "head"
        return Traits(scope, cross_layer=True, traceable=True, competing=self.per == "adaptive")

    def allot(self, layers: Sequence[LayerScores]) -> list[Tensor]:
        """Tokens per head, one int64 `[H_kv]` for each layer."""
        rows = self._by_layer(water_fill(*self._bounds(*self._rows(layers))), layers)
        if self.per == "adaptive":
            shares = [replace(layer, budget=row) for row, layer in zip(rows, layers, strict=True)]
            return AdaptiveHeads(self.safeguard).allot(shares)
        return [row.expand_as(layer.lengths) for row, layer in zip(rows, layers, strict=True)]

    def most(self, layers: Sequence[Demand]) -> list[int]:
        """The cap; of layers that get less than they hold, which alone share the total."""
        short = [x for x in layers if x.budget < x.tokens]
        total = sum(x.budget * (x.heads if self.per == "head" else 1) for x in short)
        cap = int(self.share_cap * total)
        return [min(x.tokens, max(x.budget, cap)) for x in layers]

    def _rows(self, layers: Sequence[LayerScores]) -> tuple[Tensor, ...]:
        """Of every row, `[R]`: need, entries held, budget, what always stays."""
        import torch

        rows = []
        for layer, needs in zip(layers, self._needs(layers), strict=True):
            need, entries = self._row(layer, needs)
            none = torch.zeros_like(entries)
            rows.append((need, entries, none + layer.budget, none + layer.floor))
        return tuple(map(torch.cat, zip(*rows, strict=True)))

    def _bounds(self, need: Tensor, entries: Tensor, budget: Tensor, always: Tensor) -> tuple[Tensor, ...]:
        """What `water_fill` wants: base, weights, low, high, total."""
        import torch

        total = torch.minimum(budget.sum(), entries.sum())
        low = entries.minimum(always)
        high = entries.minimum(budget.maximum((self.share_cap * total.double()).long())).maximum(low)
        high = torch.where(high.sum() < total, entries, high)
        return self.floor * budget.double(), need, low, high, total

    def _by_layer(self, rows: Tensor, layers: Sequence[LayerScores]) -> tuple[Tensor, ...]:
        import torch

        return torch.split(rows, [layer.lengths.numel() if self.per == "head" else 1 for layer in layers])

    def _needs(self, layers: Sequence[LayerScores]) -> Sequence[Tensor]:
        """MBA of every head, float64 `[H_kv]` for each layer, all at once."""
        import torch
        from torch.nn.functional import pad

        masses = [layer.mass for layer in layers if layer.mass is not None]
        if len(masses) < len(layers):
            raise RuntimeError("uncertainty is allotted without attention mass")
        longest = max(mass.shape[1] for mass in masses)
        together = torch.cat([pad(mass, (0, longest - mass.shape[1])) for mass in masses])
        return torch.split(minimal_budget(together, self.mass).double(), [len(mass) for mass in masses])

    def _row(self, layer: LayerScores, need: Tensor) -> tuple[Tensor, Tensor]:
        if self.per == "head":
            return need, layer.lengths
        # heads of one length share a row; adaptive heads may differ, and spend what a mean head holds
        entries = layer.lengths.sum(0, True) // layer.lengths.numel()
        return need.mean(0, True), entries if self.per == "adaptive" else layer.lengths.amin(0, True)


@dataclass(frozen=True)
class ZigZag(AllocationPolicy):
    """Give uncertain layers more tokens: those whose attention needs many to hold most of its mass (2412.09036).

    window: last queries whose attention is measured. mass: how much of it counts. floor: share of the mean budget that
    every layer gets. scope: budgets by layer, by KV head of all layers, or by layer and inside it by score
    (`adaptive`). safeguard: with `adaptive`, share of a layer's budget that its heads get alike.
    share_cap: largest share of a row (1: any).
    """

    name: ClassVar[str] = "zigzag"
    summary: ClassVar[str] = "SnapKV scores, each layer's budget from its measured uncertainty (LMBA)"
    default_score: ClassVar[str] = "snapkv"
    window: int = 32
    mass: float = 0.9
    floor: float = 0.2
    scope: Literal["layer", "head", "adaptive"] = "layer"
    share_cap: float = 1.0
    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.window >= 1, "window", "1 or more")
        self.require(0 < self.mass < 1, "mass", "in (0, 1)")
        self.require(0 <= self.floor <= 1, "floor", "in [0, 1]")
        self.require(self.scope in ("layer", "head", "adaptive"), "scope", "layer, head or adaptive")
        self.require(0 <= self.safeguard <= 1, "safeguard", "in [0, 1]")
        self.require(0 < self.share_cap <= 1, "share_cap", "in (0, 1]")

    def allocation(self) -> Allocation:
        """By uncertainty, over all layers."""
        return Uncertainty(self.mass, self.floor, self.scope, self.share_cap, self.safeguard)

    def over(self, before: Selection) -> Selection:
        """With unpooled attention of the whole prompt as the measure."""
        return replace(super().over(before), uncertainty=WindowAttention(self.window))
