"""k-means by direction over the keys of many rows at once.

Keys are 1 - cos apart; what stands for a cluster is the mean of its keys as they are.

Source: Liu et al., ClusterKV, arXiv 2412.03213, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

ROUNDS = 1  # of moving the centers to the means: more of them find little more (benchmarks/recall_index.py)
REFILLS = 8  # rounds that fill what is still empty at the end
SCORES = 1 << 20  # keys x clusters that are scored at once: 4 MiB
SAME = 1e-5  # squared distance of unit vectors that count as one


@dataclass(frozen=True)
class Clusters:
    """Keys `[R, n, D]` of R rows in C clusters each.

    order: `[R, n]` int64, the keys cluster by cluster, in each those nearest its mean first. sizes: `[R, C]` int64; 0
    where a row has fewer directions than clusters. means: `[R, C, D]`, float32.
    """

    order: Tensor
    sizes: Tensor
    means: Tensor


def cluster(keys: Tensor, count: int, seed: int = 0) -> Clusters:
    """The clusters of each row's keys; a row's do not depend on the other rows.

    `ROUNDS` of Lloyd's algorithm from `count` random keys; then every key joins the nearest center. A cluster that
    nobody joins gets the key that lies farthest from its own center, so none is lost to keys that repeat.
    """
    keys = keys.float().nan_to_num()
    unit = normalize(keys, dim=-1)
    private = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randperm(keys.shape[1], generator=private, dtype=torch.int64, device="cpu")
    centers = unit[:, drawn[:count].to(keys.device)]
    for _ in range(ROUNDS):
        labels = nearest(unit, centers)
        centers = reseeded(unit, labels, normalize(means(keys, labels, count)[0], dim=-1))
    labels = nearest(unit, centers)
    for _ in range(REFILLS):
        if bool(sizes_of(labels, count).all()):
            break
        centers = reseeded(unit, labels, centers)
        labels = nearest(unit, centers)
    middle, sizes = means(keys, labels, count)
    return Clusters(by_cluster(labels, distances(unit, labels, normalize(middle, dim=-1))), sizes, middle)


def nearest(unit: Tensor, centers: Tensor) -> Tensor:
    """Which of the unit vectors `centers [R, C, D]` each of `unit [R, n, D]` is nearest to: `[R, n]`.

    Of centers that point the same way it is the first, for all keys.
    """
    twins = centers @ centers.mT > 1 - SAME / 2
    twins.diagonal(dim1=1, dim2=2).fill_(True)
    first = twins.byte().argmax(-1)
    step = max(1, SCORES // (centers.shape[0] * centers.shape[1]))
    labels = [(part @ centers.mT).max(-1).indices for part in torch.split(unit, step, dim=1)]
    return first.gather(1, torch.cat(labels, 1))


def means(keys: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(mean of each cluster's keys `[R, C, D]`, 0 where it has none; how many it has `[R, C]`)."""
    rows, _, dim = keys.shape
    flat = _flat(labels, count)
    sums = keys.new_zeros(rows * count, dim).index_add_(0, flat, keys.flatten(0, 1))
    sizes = sizes_of(labels, count)
    return torch.unflatten(sums, 0, (rows, count)) / sizes.clamp(min=1).unsqueeze(-1), sizes


def sizes_of(labels: Tensor, count: int) -> Tensor:
    """How many keys each cluster has, `[R, C]`."""
    return torch.unflatten(torch.bincount(_flat(labels, count), minlength=labels.shape[0] * count), 0, (-1, count))


def _flat(labels: Tensor, count: int) -> Tensor:
    """Labels of all rows as numbers of clusters of all rows."""
    rows = torch.arange(labels.shape[0], dtype=torch.int64, device=labels.device).unsqueeze(1)
    return (rows * count + labels).flatten()


def distances(unit: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Squared distance of each key's direction from that of its center, 2 (1 - cos) of vectors that are not 0."""
    own = centers.flatten(0, 1).index_select(0, _flat(labels, centers.shape[1]))
    return (unit - own.view_as(unit)).square_().sum(-1)


def by_cluster(labels: Tensor, distance: Tensor) -> Tensor:
    """The keys cluster by cluster, in each by distance (0 to 4), `[R, n]`."""
    return (labels.double() + distance.double() / 8).argsort(dim=1, stable=True)


def reseeded(unit: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """The centers, with those of empty clusters put where another cluster's farthest key is.

    The worst of these first, one of each cluster; none that points where its center does.
    """
    sizes = sizes_of(labels, centers.shape[1])
    if bool(sizes.all()):
        return centers
    distance = distances(unit, labels, centers)
    last = by_cluster(labels, distance).gather(1, (sizes.cumsum(1) - 1).clamp(min=0))
    worst, donors = distance.gather(1, last).masked_fill(sizes < 2, 0).sort(dim=1, descending=True, stable=True)
    empty = sizes.sign().argsort(dim=1, stable=True)
    row, place = ((worst > SAME) & (sizes.gather(1, empty) == 0)).nonzero(as_tuple=True)
    centers = centers.clone()
    centers[row, empty[row, place]] = unit[row, last[row, donors[row, place]]]
    return centers
