"""Stretches of consecutive entries: where they end, and the mean key of each."""

from __future__ import annotations

import torch
from torch import Tensor


def even(rows: int, entries: int, count: int, unit: int, device: torch.device) -> Tensor:
    """Sizes of `count` stretches of whole units, as alike as can be, the larger ones first, `[rows, count]` int64."""
    units = entries // unit
    place = torch.arange(count, dtype=torch.int64, device=device)
    return (unit * (units // count + (place < units % count).long())).expand(rows, count)


def whole_units(sizes: Tensor, unit: int) -> Tensor:
    """Sizes of stretches whose ends have moved to the nearest whole unit, `[R, G]`; some may be 0."""
    ends = (sizes.cumsum(1) + unit // 2) // unit * unit
    return ends.diff(dim=1, prepend=ends.new_zeros(ends.shape[0], 1))


def means(keys: Tensor, sizes: Tensor) -> Tensor:
    """Mean key of each stretch of `keys [R, n, D]`, `[R, G, D]`, float32; 0 where one has no entry."""
    rows, groups = sizes.shape
    which = torch.arange(rows * groups, dtype=torch.int64, device=keys.device).repeat_interleave(sizes.flatten())
    sums = torch.zeros(rows * groups, keys.shape[2], dtype=torch.float32, device=keys.device)
    sums.index_add_(0, which, keys.float().flatten(0, 1))
    return torch.unflatten(sums / sizes.flatten().clamp(min=1).unsqueeze(1), 0, (rows, groups))
