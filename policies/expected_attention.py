"""Expected attention: what future queries will attend to, from the statistics of past ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.policies.base import SelectionPolicy

from kvcompile.selection import Score

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.observe import Observation


@dataclass(frozen=True)
class FutureAttention(Score):
    """Expected attention of queries q ~ N(mu, Sigma) at the next `horizon` positions, times the size of the value.

    a[g, j] = softmax_j(c k_j mu' + c^2 k_j Sigma' k_j / 2), mu' = mu R, Sigma' = R^T Sigma R, c = 1 / sqrt(d)
    s[h, j] = avg_kernel( (mean_g a[g, j] + epsilon) ||v_j||_2 ), over `kernel` neighbours of the row
    mu, Sigma: moments of the queries before rotation without the first 4 tokens; R: mean rotation (row vectors).
    Source: arXiv 2510.00636, section 3; the pooling is SnapKV's (2404.14469). A soft-cap on the logits is not modelled.
    """

    horizon: int
    epsilon: float
    kernel: int = 1

    @property
    def moments(self) -> bool:
        """Mean and covariance of the queries."""
        return True

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`; before the fifth token there are no moments, and all entries are expected alike."""
        import torch

        from kvcompile.observe import pool

        sizes: Tensor = torch.linalg.vector_norm(seen.values.float(), dim=-1)
        if seen.moments is None:
            return sizes
        if seen.mean_rotation is None:
            raise RuntimeError("expected attention needs the mean rotation")
        rotation = seen.mean_rotation(self.horizon).float()
        keys = seen.keys.float()
        expected = torch.zeros_like(sizes)
        for g in range(seen.moments.mean.shape[1]):  # one query head of each group at a time: [H_kv, n, D] at most
            mean = seen.moments.mean[:, g] @ rotation  # [H_kv, D]
            covariance = rotation.T @ seen.moments.covariance[:, g] @ rotation  # [H_kv, D, D]
            spread = ((keys @ covariance) * keys).sum(-1)
            logits = seen.scale * (keys @ mean.unsqueeze(-1)).squeeze(-1) + seen.scale**2 * spread / 2
            expected += logits.masked_fill(~seen.alive, float("-inf")).softmax(-1)
        scores = (expected / seen.moments.mean.shape[1] + self.epsilon) * sizes
        return scores if self.kernel == 1 else pool(scores, self.kernel, "avg", seen.alive)


@dataclass(frozen=True)
class ExpectedAttention(SelectionPolicy):
    """Keep the tokens that the coming queries will attend to, estimated from the past ones (arXiv 2510.00636).

    horizon: how many coming positions the rotation is averaged over. epsilon: weight of the value's norm alone; the
    paper's 0 lets one sharp estimate decide, which loses needles (see `benchmarks/`). kernel: neighbours whose scores
    are averaged; without it (the paper's 1) the token that ends a copied span is dropped, and the copy runs on.
    """

    name: ClassVar[str] = "expected_attention"
    summary: ClassVar[str] = "what future queries will attend to, from the statistics of past ones"
    horizon: int = 512
    epsilon: float = 0.01
    kernel: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.horizon >= 1, "horizon", "1 or more")
        self.require(self.epsilon >= 0, "epsilon", "0 or more")
        self.require(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", "odd")

    def score(self) -> Score:
        """Expected attention times value norm, pooled."""
        return FutureAttention(self.horizon, self.epsilon, self.kernel)
