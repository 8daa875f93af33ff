"""The attention that a compiled model runs: one shape for all families, transparent to the tracer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kvcompile.graph import ops


class Attention(nn.Module):
    """Base adapter: keeps the original projections under their names and calls the graph's ops in between.

    A family overrides `project` (states to q, k, v `[B, H, Q, D]`) or the names of its submodules.
    """

    keeps: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    out: str = "o_proj"

    def __init__(self, original: nn.Module, layer: int, head_dim: int) -> None:
        super().__init__()
        for name in self.keeps:
            setattr(self, name, getattr(original, name))
        self.layer_idx, self.head_dim = layer, head_dim

    def heads(self, states: Tensor) -> Tensor:
        """`[B, Q, H * D]` to `[B, H, Q, D]`; the number of heads is read off the tensor (they may be sharded)."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before rotation."""
        return self.heads(self.q_proj(states)), self.heads(self.k_proj(states)), self.heads(self.v_proj(states))

    def rotate(self, queries: Tensor, keys: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """Rotary position embedding of queries and keys."""
        cos, sin = position_embeddings
        return ops.rope(queries, cos, sin), ops.rope(keys, cos, sin)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of new tokens to the cache; `attention_mask` carries the `Step` of this pass."""
        step, layer = attention_mask, self.layer_idx
        unrotated, keys, values = self.project(hidden_states)
        queries, keys = self.rotate(unrotated, keys, position_embeddings)
        kv = ops.kv_append(past_key_values, keys, values, step, layer)
        ops.observe(kv, queries, unrotated, step, layer)
        return getattr(self, self.out)(ops.attend(queries, kv, step, layer)), None
