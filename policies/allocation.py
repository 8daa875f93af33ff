"""Splitting a whole number of tokens over rows (layers, or KV heads): exact sums, bounds kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 1e-9  # floating-point dust below a whole number


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers next to `shares` that sum to `total`: floors, then one more each for the largest remainders.

    `sum(shares)` must be `total`; of equal remainders the first wins, so the order of the shares is kept.
    """
    whole = [int(share + ROUNDING) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: round((whole[i] - shares[i]) / ROUNDING))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def water_fill(base: Tensor, weights: Tensor, low: Tensor, high: Tensor, total: Tensor) -> Tensor:
    """Tokens `[R]`, int64, that sum to `total` (one number) clamped to `[sum(low), sum(high)]`.

    x = clamp(base + level * weights, low, high), with the one `level` that gives the sum, then largest remainders:
    what the bounds take from one row goes to the others in proportion to their weights.
    base, weights: float64 `[R]`, weights > 0. low <= high: int64 `[R]`. Nothing is read back, so it can be traced.
    """
    import torch

    total = torch.minimum(total, high.sum()).maximum(low.sum())
    bends = torch.cat(((low - base) / weights, (high - base) / weights)).sort().values
    filled = (base + bends.unsqueeze(1) * weights).clamp(low, high).sum(1)
    right = (filled < total).sum().clamp(1, len(bends) - 1).view(1)
    (before, after), (first, last) = ((x.gather(0, right - 1), x.gather(0, right)) for x in (filled, bends))
    along = torch.where(after > before, (total - before) / (after - before), 0.0)
    shares = (base + (first + along * (last - first)) * weights).clamp(low, high)
    whole = (shares + ROUNDING).floor()
    rank = ((whole - shares) / ROUNDING).round().argsort(stable=True).argsort()
    return whole.long() + (rank < total - whole.sum())
