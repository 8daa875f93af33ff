"""Rotary positions of entries that moved."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.runtime.cache import Rotary, Step
from kvcompile.runtime.layer import LayerCache


def _rotation(cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    """The matrix `[D, D]` that turns row vectors by `cos, sin [D_rot]` (half-split); channels past `D_rot` stay."""
    half = cos.shape[0] // 2
    out = torch.eye(dim, device=cos.device, dtype=torch.float32)
    out[: 2 * half, : 2 * half] = torch.diag(cos)
    out[half : 2 * half, :half] -= torch.diag(sin[:half])
    out[:half, half : 2 * half] += torch.diag(sin[half:])
    return out


def _close_ranks(step: Step, index: int, kv: LayerCache, indices: list[Tensor]) -> None:
    """Rotate kept keys to positions 0..n-1 (StreamingLLM: position inside the cache); new tokens follow on.

    Between two evictions entry j of a row sits at rotary position j, so entry `indices[i]` turns by `i - indices[i]`.
    """
    cache = step.cache
    kv.rewrite(
        [
            turn(
                keys,
                index_row,
                torch.arange(index_row.numel(), device=keys.device, dtype=torch.int64),
                cache.rotaries[index],
            )
            for (keys, _, _), index_row in zip(kv.held.rows(), indices, strict=True)
        ]
    )
    per_sequence = kv.held.lengths[:: kv.held.heads]
    shift = [seen - n for seen, n in zip(cache.seen, per_sequence, strict=True)]
    cache.shift = torch.tensor(shift, device=indices[0].device, dtype=torch.int64)


def turn(keys: Tensor, old: Tensor, new: Tensor, rotary: Rotary) -> Tensor:
    """Rotated keys `[n, D]` moved from positions `old [n]` to `new [n]`, angles in float32.

    k' = k cos(d) + rotate_half(k) sin(d), d = (new - old) theta; an amplitude in the rotary table cancels.
    """
    (cos_o, sin_o), (cos_n, sin_n) = ((x.float() for x in rotary(p)) for p in (old, new))
    amplitude = cos_o.square() + sin_o.square()
    cos = (cos_n * cos_o + sin_n * sin_o) / amplitude
    sin = (sin_n * cos_o - cos_n * sin_o) / amplitude
    width = cos.shape[-1]
    first, second = keys[:, :width].float().chunk(2, -1)
    turned = keys[:, :width].float() * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned.to(keys.dtype), keys[:, width:]), -1)
