"""Expected attention: what future queries will attend to, from the statistics of past ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.selection import Needs, Score
from kvcompile.policies.base import SelectionPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Moments, Observation

ENTRY_BLOCK = 1024  # keys at a time: their products with all query heads stay in the processor's cache


@dataclass(frozen=True)
class FutureAttention(Score):
    """Expected attention of queries q ~ N(mu, Sigma) at the next `horizon` positions, times the size of the value.

    a[g, j] = softmax_j(c k_j mu' + c^2 k_j Sigma' k_j / 2), mu' = mu R, Sigma' = R^T Sigma R, c = 1 / sqrt(d)
    s[h, j] = avg_kernel( (mean_g a[g, j] + epsilon) ||v_j||_2 ), over `kernel` neighbours of the row
    mu, Sigma: moments of every `stride`-th query before rotation without the first 4 tokens; R: mean rotation (row
    vectors).
    Source: arXiv 2510.00636, section 3; the pooling is SnapKV's (2404.14469). A soft-cap on the logits is not modelled.
    """

    horizon: int
    epsilon: float
    kernel: int = 1
    stride: int = 1

    @property
    def needs(self) -> Needs:
        """Mean and covariance of the queries."""
        return Needs(moments=self.stride)

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`; before the fifth token there are no moments, and all entries are expected alike."""
        import torch

        from kvcompile.runtime.observation import pool

        sizes: Tensor = torch.linalg.vector_norm(seen.values.float(), dim=-1)
        if seen.moments is None:
            return sizes
        if seen.mean_rotation is None:
            raise RuntimeError("expected attention needs the mean rotation")
        logits = _logits(seen, seen.moments, seen.mean_rotation(self.horizon))
        expected = seen.softmax(logits.masked_fill(~seen.alive.unsqueeze(1), float("-inf"))).mean(1)
        scores = (expected + self.epsilon) * sizes
        return scores if self.kernel == 1 else pool(scores, self.kernel, "avg", seen.alive)


def _logits(seen: Observation, moments: Moments, rotation: Tensor) -> Tensor:
    """c k mu' + c^2 k Sigma' k / 2 for every query head and entry, `[H_kv, g, n]`.

    That is the dot product of k and c mu' + c^2 k Sigma' / 2: one matrix product for all query heads of a KV head,
    their (symmetric) Sigma' side by side as `[D, g D]`.
    """
    import torch

    heads, group, dim = moments.mean.shape
    turn = rotation * seen.scale
    means = (moments.mean @ turn).view(heads, 1, group * dim)
    covariances = (turn.T @ moments.covariance @ turn).view(heads, group * dim, dim).mT
    logits = []
    every = seen.keys.float()
    # in a trace the number of blocks would fix the length of the prompt
    for keys in (every,) if torch.compiler.is_compiling() else torch.split(every, ENTRY_BLOCK, 1):
        products = torch.unflatten(torch.baddbmm(means, keys, covariances, alpha=0.5), -1, (group, dim))
        logits.append(products.mul_(keys.unsqueeze(2)).sum(-1).mT)
    return torch.cat(logits, -1)


@dataclass(frozen=True)
class ExpectedAttention(SelectionPolicy):
    """Keep the tokens that the coming queries will attend to, estimated from the past ones (arXiv 2510.00636).

    horizon: how many coming positions the rotation is averaged over. epsilon: weight of the value's norm alone; the
    paper's 0 lets one sharp estimate decide, which loses needles (see `benchmarks/`). kernel: neighbours whose scores
    are averaged; without it (the paper's 1) the token that ends a copied span is dropped, and the copy runs on.
    stride: every how many-th query the statistics are of; above the paper's 1 a look takes less time and knows less.
    """

    name: ClassVar[str] = "expected_attention"
    summary: ClassVar[str] = "what future queries will attend to, from the statistics of past ones"
    horizon: int = 512
    epsilon: float = 0.01
    kernel: int = 3
    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.horizon >= 1, "horizon", "1 or more")
        self.require(self.epsilon >= 0, "epsilon", "0 or more")
        self.require(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", "odd")
        self.require(self.stride >= 1, "stride", "1 or more")

    def score(self) -> Score:
        """Expected attention times value norm, pooled."""
        return FutureAttention(self.horizon, self.epsilon, self.kernel, self.stride)
