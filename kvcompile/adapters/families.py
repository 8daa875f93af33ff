"""One adapter per family of attention layers: how each gets queries, keys and values out of hidden states."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.base import Attention


class Separate(Attention):
    """Three projections: llama, mistral, mixtral, qwen2, smollm3, granite, gemma2."""


class HeadNormed(Attention):
    """Three projections, each query and key head normed by itself: qwen3, gemma3."""

    keeps: ClassVar[tuple[str, ...]] = (*Attention.keeps, "q_norm", "k_norm")
    q_norm: nn.Module
    k_norm: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norms over the last dimension of `[B, H, Q, D]`."""
        queries, keys, values = super().project(states)
        return self.q_norm(queries), self.k_norm(keys), values


class WidthNormed(Attention):
    """Three projections, queries and keys normed over all heads at once: olmo2."""

    keeps: ClassVar[tuple[str, ...]] = HeadNormed.keeps
    q_norm: nn.Module
    k_norm: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norms over `H * D` before the heads are split."""
        queries, keys = self.q_norm(self.q_proj(states)), self.k_norm(self.k_proj(states))
        return self.heads(queries), self.heads(keys), self.heads(self.v_proj(states))

    def rotate(self, queries: Tensor, keys: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """In float32, which this family's cos and sin have whatever the model's dtype, then cast back."""
        turned, keys_turned = super().rotate(queries, keys, position_embeddings)
        return turned.type_as(queries), keys_turned.type_as(keys)


class Fused(Attention):
    """One projection, all query heads, then all key heads, then all value heads: phi3."""

    keeps: ClassVar[tuple[str, ...]] = ("o_proj", "qkv_proj")
    qkv_proj: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, Q, (g + 2) * H_kv * D]` cut into g + 2 equal parts: g of queries, one of keys, one of values."""
        if self.reads:  # only the rows of the queries are left, and only the queries will be used
            queries = self.heads(self.qkv_proj(states))
            return queries, queries, queries
        parts = torch.unflatten(self.qkv_proj(states), -1, (self.group + 2, -1))
        queries, keys, values = torch.split(parts, [self.group, 1, 1], 2)
        return self.heads(queries.flatten(2)), self.heads(keys.flatten(2)), self.heads(values.flatten(2))


class Interleaved(Attention):
    """One projection, per KV head its queries, its key and its value: gpt_neox, where each head has one query."""

    keeps: ClassVar[tuple[str, ...]] = ("query_key_value", "dense")
    out: ClassVar[str] = "dense"
    query_key_value: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, Q, H_kv * (g + 2) * D]` to `[B, H_kv, Q, (g + 2) * D]`, cut into g queries, a key and a value."""
        if self.reads:  # as in `Fused`
            queries = self.heads(self.query_key_value(states))
            return queries, queries, queries
        dim, group = self.head_dim, self.group
        heads = torch.unflatten(self.query_key_value(states), -1, (-1, (group + 2) * dim)).transpose(1, 2)
        queries, keys, values = torch.split(heads, [group * dim, dim, dim], -1)
        if group > 1:
            queries = torch.unflatten(queries, -1, (group, dim)).transpose(2, 3).flatten(1, 2)
        return queries, keys, values

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the base; this family's layers call the cache `layer_past`."""
        cache = past_key_values if layer_past is None else layer_past
        return super().forward(hidden_states, position_embeddings, attention_mask, cache)
