"""SnapKV: the last queries vote for the tokens that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvcompile.plan.selection import Needs, Score
from kvcompile.policies.base import SelectionPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class WindowAttention(Score):
    """Attention that the last `window` queries pay to each entry, pooled along the sequence, one vote per KV head.

    s[h, j] = pool_kernel( reduce_{g, i} A[h, g, i, j] ), A normalised over all entries; only entries before the window
    are pooled, those in it always stay. The paper's sum over rows ranks like the mean.
    Source: SnapKV, arXiv 2404.14469, section 4; max over group and rows keeps the needle (see benchmarks).
    """

    window: int
    kernel: int = 1
    pooling: Literal["avg", "max"] = "avg"
    reduce: Literal["mean", "max"] = "mean"

    comparable = True

    @property
    def needs(self) -> Needs:
        """The observation window; its mean attention, where that is what it takes."""
        return Needs(queries=self.window, reduce="mean" if self.reduce == "mean" else None)

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`."""
        from kvcompile.runtime.observation import pool

        votes = seen.mean_attention() if self.reduce == "mean" else seen.attention().amax(dim=(1, 2))
        if self.kernel == 1:
            return votes
        before = (seen.positions >= 0) & (seen.positions < seen.query_positions[0])
        return pool(votes, self.kernel, self.pooling, before)


@dataclass(frozen=True)
class SnapKV(SelectionPolicy):
    """Keep the tokens that the last `window` queries attend to, after prefill (arXiv 2404.14469).

    window: last queries, which vote and always stay.
    kernel: how many neighbours share a vote (odd); it decides how much of a sentence stays with the word that is asked
    for: at a tenth of the tokens, with reduce=max, 7 lost all needles of the default model and 21 none
    (`benchmarks/results/snapkv_pool.md`).
    pooling: of the neighbours. reduce: over the window and the query heads of a KV head.
    """

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "tokens that the last queries of the prompt attend to"
    window: int = 32
    kernel: int = 7
    pooling: Literal["avg", "max"] = "max"
    reduce: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.window >= 1, "window", "1 or more")
        self.require(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", "odd")
        self.require(self.pooling in ("avg", "max"), "pooling", "avg or max")
        self.require(self.reduce in ("mean", "max"), "reduce", "mean or max")

    @property
    def recent(self) -> int:
        """The window itself stays."""
        return self.window

    def score(self) -> Score:
        """Pooled window attention."""
        return WindowAttention(self.window, self.kernel, self.pooling, self.reduce)
