"""Attention of a program: library calls over rows of fixed capacity, empty places masked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.plan.plan import LayerPlan


def causal(p: LayerPlan, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attention of a prompt to itself: `[B, H_q, T, D]`, `[B, H_kv, T, D]`, positions `[T]`."""
    if not p.softcap and not p.sliding_window:
        return F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=p.scale, enable_gqa=queries.shape[1] > keys.shape[1]
        )
    queries_at = positions.unsqueeze(-1)
    visible = positions <= queries_at
    if p.sliding_window:
        visible = visible & (positions > queries_at - p.sliding_window)
    return masked(p, queries, keys, values, visible)


def masked(p: LayerPlan, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """softmax(softcap(Q K^T scale)) V over the entries `visible [B, H_kv, Q or 1, n]` (or fewer dimensions).

    Where there is one query, those of a group are rows of one product, so that no key is read twice.
    """
    rows = torch.unflatten(queries, 1, (keys.shape[1], -1))  # [B, H_kv, g, Q, D]
    if p.softcap:
        logits = torch.matmul(rows, keys.unsqueeze(2).mT).float() * p.scale
        logits = p.softcap * torch.tanh(logits / p.softcap)
        weights = logits.masked_fill(~visible.unsqueeze(-3), float("-inf")).softmax(-1)
        return torch.matmul(weights.to(values.dtype), values.unsqueeze(2)).flatten(1, 2)
    if queries.shape[2] == 1:
        out = F.scaled_dot_product_attention(rows.squeeze(3), keys, values, attn_mask=visible, scale=p.scale)
        return out.unsqueeze(3).flatten(1, 2)
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=visible, scale=p.scale, enable_gqa=queries.shape[1] > keys.shape[1]
    )
