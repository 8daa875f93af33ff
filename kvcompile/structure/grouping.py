"""KV heads in equal groups of like ones, by what they compute on text."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.calibration.activations import LayerKV
from kvcompile.plan.structure import Groups, contiguous
from kvcompile.structure.precision import precise


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
