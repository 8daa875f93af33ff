"""What a selection means, said once: pure functions of tensors, for the cache and for exported programs alike.

Rows are `[..., n]`; true positions ascend, -1 where a row has no entry. Only `highest` reads numbers back from tensors,
so all the others can be traced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.plan.selection import Allocation, LayerScores, Tiers
from kvcompile.runtime.observation import Moments

INFINITY = float("inf")
EXCLUDED_FROM_MOMENTS = 4  # the first tokens are attention sinks; their queries are unlike all others


def candidates(positions: Tensor, tokens: int | Tensor, window: int | None) -> Tensor:
    """Entries that may stay, bool: those that are there and, under a `window`, among the newest so many of `tokens`."""
    there = positions >= 0
    return there & (positions >= tokens - window) if window else there


def protect(
    scores: Tensor, positions: Tensor, among: Tensor, tokens: int | Tensor, sinks: int, recent: int | Tensor
) -> Tensor:
    """The scores with what always stays at +inf, and all but the entries `among` (bool) at -inf.

    Always: the first `sinks` and the last `recent` of `tokens` seen.
    """
    always = (positions < sinks) | (positions >= tokens - recent)
    return scores.masked_fill(always, INFINITY).masked_fill(~among, -INFINITY)


def split(allocation: Allocation, layers: Sequence[LayerScores]) -> list[Tensor]:
    """Entries that every head keeps, int64 `[H_kv]` for each layer: its share of the budget, if it has as many."""
    counts = allocation.allot(layers)
    return [count.minimum(layer.lengths) for count, layer in zip(counts, layers, strict=True)]


def high_counts(tiers: Tiers, layer: LayerScores, counts: Tensor) -> Tensor:
    """Of the `counts [H_kv]` entries that each head keeps, how many are held in high precision."""
    if tiers.alpha is not None:
        return (layer.scores >= tiers.alpha / (layer.newest + 1)).sum(1).minimum(counts)
    return (tiers.share * counts + 1e-6).long().clamp(min=int(layer.floor)).minimum(counts)


def highest(scores: Tensor, counts: Tensor) -> list[Tensor]:
    """Indices of each head's `counts[h]` highest `scores [H_kv, n]`, ascending; of equal ones the older stays."""
    wanted = counts.tolist()
    ranked = scores.topk(max(wanted), dim=1).values
    return [_highest(row, best, n) for row, best, n in zip(scores, ranked, wanted, strict=True)]


def _highest(scores: Tensor, ranked: Tensor, count: int) -> Tensor:
    """`highest` of one head; `ranked` are its highest scores in descending order, `count` or more of them."""
    if not count:
        return torch.empty(0, dtype=torch.long, device=scores.device)
    best = (scores >= ranked[count - 1]).nonzero().squeeze(-1)
    if best.numel() == count:
        return best
    last = scores[best] == ranked[count - 1]
    spare = best.numel() - count  # the newest of those that tie for the last place go
    return best[~last | (last.cumsum(0) <= last.sum() - spare)]


def highest_padded(scores: Tensor, counts: Tensor, room: int) -> Tensor:
    """The same in one shape: `[B, H_kv, room]` for `scores [B, H_kv, n]`, with `n` after each row's indices.

    A stable sort takes longer than `topk`, which in turn would have to know `counts`.
    """
    n = scores.shape[-1]
    padded = F.pad(scores, (0, room), value=-INFINITY)
    order = padded.sort(dim=-1, descending=True, stable=True).indices[..., :room]
    empty = torch.arange(room, device=scores.device, dtype=torch.int64) >= counts.unsqueeze(-1)
    return torch.where(empty, n, order).sort(dim=-1).values


def in_moments(positions: Tensor, stride: int) -> Tensor:
    """Whether queries at `positions` count towards mean and covariance."""
    return (positions >= EXCLUDED_FROM_MOMENTS) & (positions % stride == 0)


def moments(count: int | Tensor, total: Tensor, outer: Tensor, heads: int) -> Moments:
    """Mean and covariance per KV head of `count` queries: of their sum `[H_q, D]` and that of q^T q, `[H_q, D, D]`."""
    mean = total / count
    covariance = torch.baddbmm(outer * (1 / count), mean.unsqueeze(-1), mean.unsqueeze(-2), alpha=-1)
    return Moments(count, torch.unflatten(mean, 0, (heads, -1)), torch.unflatten(covariance, 0, (heads, -1)))
