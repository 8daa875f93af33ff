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
    by_remainder = sorted(range(len(shares)), key=lambda i: whole[i] - shares[i])
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def water_fill(base: Tensor, weights: Tensor, low: Tensor, high: Tensor, total: int) -> Tensor:
    """Tokens `[R]`, int64, that sum to `total` clamped to `[sum(low), sum(high)]`.

    x = clamp(base + level * weights, low, high), with the one `level` that gives the sum, then largest remainders:
    what the bounds take from one row goes to the others in proportion to their weights.
    base, weights: float64 `[R]`, weights > 0. low <= high: int64 `[R]`.
    """
    import torch

    device = base.device
    base, weights, low, high = base.cpu(), weights.cpu(), low.cpu(), high.cpu()
    total = max(int(low.sum()), min(total, int(high.sum())))
    bends = torch.cat(((low - base) / weights, (high - base) / weights)).sort().values
    sums = (base + bends[:, None] * weights).clamp(low, high).sum(1)
    right = int(torch.searchsorted(sums, float(total)).clamp(1, len(bends) - 1))
    span = float(sums[right] - sums[right - 1])
    along = (total - float(sums[right - 1])) / span if span > 0 else 0.0
    level = bends[right - 1] + along * (bends[right] - bends[right - 1])
    shares = (base + level * weights).clamp(low, high)
    return torch.tensor(largest_remainder(shares.tolist(), total), device=device)
