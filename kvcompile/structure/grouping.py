"""KV heads brought together by what they compute on text: in groups of like ones, turned towards their mean."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.calibration.activations import LayerKV
from kvcompile.plan.structure import Groups, contiguous
from kvcompile.structure.precision import precise

ROUNDS = 8  # of a generalised Procrustes fit; the mean moves by less than 1e-3 after a few


def by_similarity(kv: LayerKV, kept: int) -> Groups:
    """`kept` groups of KV heads, alike in size, of the largest similarity inside the groups that exchanges find."""
    return partition((similarity(kv.keys) + similarity(kv.values)) / 2, kept)


def similarity(activations: Tensor) -> Tensor:
    """S[i, j] = <X_i, X_j> / (|X_i| |X_j|) of `activations [H, n, D]`: `[H, H]`, 1 where heads are equal."""
    rows = torch.nn.functional.normalize(precise(activations).flatten(1), dim=1)
    return rows @ rows.T


def partition(alike: Tensor, kept: int) -> Groups:
    """Equal groups that maximise the sum of `alike [H, H]` over pairs of one group, never below neighbouring heads.

    Exchanges of two heads between groups, best first, until none gains; from neighbours and from a greedy start.
    Groups and their heads are in ascending order. Source: QCQA, arXiv 2406.10247, poses the problem.
    """
    number = alike.shape[0]
    table: list[list[float]] = alike.tolist()
    starts = [[list(group) for group in contiguous(number, kept)], _greedy(table, number // kept)]
    candidates = [_exchanged(table, start) for start in starts]
    best = max(candidates, key=lambda groups: (_inside(table, groups), groups == starts[0]))
    return tuple(sorted(tuple(sorted(group)) for group in best))


def _inside(table: list[list[float]], groups: list[list[int]]) -> float:
    return sum(table[i][j] for group in groups for i in group for j in group if i < j)


def _greedy(table: list[list[float]], size: int) -> list[list[int]]:
    left, groups = list(range(len(table))), []
    while left:
        group = [left.pop(0)]
        while len(group) < size:
            mate = max(left, key=lambda h: sum(table[h][i] for i in group))
            left.remove(mate)
            group.append(mate)
        groups.append(group)
    return groups


def _exchanged(table: list[list[float]], start: list[list[int]]) -> list[list[int]]:
    groups = [list(group) for group in start]
    while True:
        best, swap = 1e-9, None
        for a, one in enumerate(groups):
            for b in range(a + 1, len(groups)):
                for i, x in enumerate(one):
                    for j, y in enumerate(groups[b]):
                        gain = _gain(table, one, groups[b], x, y)
                        if gain > best:
                            best, swap = gain, (a, i, b, j)
        if swap is None:
            return groups
        a, i, b, j = swap
        groups[a][i], groups[b][j] = groups[b][j], groups[a][i]


def _gain(table: list[list[float]], one: list[int], other: list[int], x: int, y: int) -> float:
    gain = sum(table[y][h] - table[x][h] for h in one if h != x)
    gain_of_other = sum(table[x][h] - table[y][h] for h in other if h != y)
    return gain + gain_of_other


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
