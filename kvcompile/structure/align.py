"""Rotations that bring heads together before their mean, without changing what the model computes."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.plan.structure import Groups
from kvcompile.structure.precision import precise

ROUNDS = 8  # of a generalised Procrustes fit; the mean moves by less than 1e-3 after a few


def alignment(activations: Tensor, groups: Groups, rotary: int) -> Tensor:
    """Rotations `[H_kv, D, D]` (float64) that move each head's `activations [H_kv, n, D]` towards its group's mean.

    Generalised Procrustes: R_h = argmin |R_h x_h - m|, m = mean_h R_h x_h, in turns, from m = the group's first head.
    The first `rotary` channels (half-split pairs i, i + rotary / 2) are only turned pair by pair, because one 2-D
    rotation per frequency is what commutes with RoPE; the others by any orthogonal matrix (0: all of them).
    """
    x = precise(activations)
    rotations = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).repeat(x.shape[0], 1, 1)
    for group in groups:
        target = x[group[0]]
        for _ in range(ROUNDS if len(group) > 1 else 0):
            for h in group:
                rotations[h] = _towards(x[h], target, rotary)
            target = torch.stack([x[h] @ rotations[h].T for h in group]).mean(0)
    return rotations


def _towards(x: Tensor, target: Tensor, rotary: int) -> Tensor:
    """R `[D, D]` that minimises sum_t |R x_t - y_t|^2 among the rotations allowed, for `x, target [n, D]`."""
    rotation = x.new_zeros(x.shape[1], x.shape[1])
    half = rotary // 2
    if half:
        a, b, c, d = x[:, :half], x[:, half:rotary], target[:, :half], target[:, half:rotary]
        angle = torch.atan2((a * d - b * c).sum(0), (a * c + b * d).sum(0))
        i = torch.arange(half, device=x.device, dtype=torch.int64)
        rotation[i, i] = rotation[i + half, i + half] = angle.cos()
        rotation[i, i + half], rotation[i + half, i] = -angle.sin(), angle.sin()
    if rotary < x.shape[1]:
        u, _, v = torch.linalg.svd(target[:, rotary:].T @ x[:, rotary:])
        rotation[rotary:, rotary:] = u @ v
    return rotation
