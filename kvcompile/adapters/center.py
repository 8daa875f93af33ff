"""Keys less what they have in common, which no softmax sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Center(nn.Module):
    """k - m, with the `mean [H_kv, D]` of each head: q . (k_j - m) is q . k_j less the same for all j."""

    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, keys: Tensor) -> Tensor:
        """`[B, H_kv, Q, D]`, after position embedding."""
        return keys - self.mean.unsqueeze(1)


def without_centers(state: Mapping[str, Any]) -> dict[str, Any]:
    """Weights by name, as a model that stores its keys as they are has them."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(".center.mean")}
