"""ClusterKV: read the clusters of tokens whose mean key suits the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcompile.plan.recall import Entries, Form, Grouping, Groups
from kvcompile.policies.recall import RecallPolicy


@dataclass(frozen=True)
class KeyClusters(Grouping):
    """Tokens whose keys point the same way, about `tokens` in a cluster; what stands for one is the mean of its keys.

    Where tokens share scales, the ends of clusters move to whole units. Tokens that cannot change places any more, as
    they are encoded, are grouped as they stand.
    """

    form: ClassVar[Form] = "vector"
    reorders: ClassVar[bool] = True
    tokens: int
    seed: int

    def count(self, entries: int, unit: int) -> int:
        """One for each `tokens` entries, none smaller than a unit, at least one."""
        return max(1, entries // max(self.tokens, unit))

    def divide(self, entries: Entries) -> Groups:
        """Mean keys of the clusters `[R, G, D]`, their sizes, and the order that puts one after the other."""
        from kvcompile.recall import kmeans, stretches

        keys, unit = entries.keys, entries.unit
        rows, length, dim = keys.shape
        count = self.count(length, unit)
        if not entries.movable:
            sizes = stretches.even(rows, length, count, unit, keys.device)
            return Groups(stretches.means(keys, sizes).to(keys.dtype), sizes)
        clusters = kmeans.cluster(keys, count, self.seed)
        sizes, means = clusters.sizes, clusters.means
        if unit > 1:
            sizes = stretches.whole_units(sizes, unit)
            means = stretches.means(keys.gather(1, clusters.order.unsqueeze(-1).expand(-1, -1, dim)), sizes)
        return Groups(means.to(keys.dtype), sizes, clusters.order)


@dataclass(frozen=True)
class ClusterKV(RecallPolicy):
    """Keep everything, and read the clusters of tokens whose keys the query asks for.

    k-means over the keys of each KV head, by direction; a cluster is worth q . mean of its keys, and of the last one
    that is read only the tokens nearest its mean. Tokens of later prompts, and every 320 decoded ones, form clusters
    among themselves. Layers 0 and 1 read everything. Liu et al., arXiv 2412.03213, sections 3.2 and 3.3.

    tokens_per_cluster: tokens for each cluster. seed: of the keys that k-means starts from.
    """

    name: ClassVar[str] = "clusterkv"
    summary: ClassVar[str] = "keeps all; reads the clusters whose mean key suits the query"
    tokens_per_cluster: int = 80
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.tokens_per_cluster >= 1, "tokens_per_cluster", "1 or more")
        self.require(0 <= self.seed < 1 << 63, "seed", "0 or more, below 2^63")

    def grouping(self) -> KeyClusters:
        """Clusters of keys."""
        return KeyClusters(self.tokens_per_cluster, self.seed)
