"""Measures of attention for study: no policy allots by them."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_outputs(attention: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention outputs from the top-B entries alone, for every B, and the mass those entries hold.

    o(B) = sum_{j in top-B} a_j v_j / m_B, m_B = sum_{j in top-B} a_j, so that for the whole output o
    o - o(B) = (1 - m_B) (mean of the dropped values under a - o(B)).
    attention `[R, n]` (rows sum to 1), values `[R, n, D]`; returns `[R, n, D]` and `[R, n]`, float64, B = 1..n.
    """
    weights, order = attention.double().sort(dim=-1, descending=True, stable=True)
    ranked = values.double().gather(1, order.unsqueeze(-1).expand_as(values))
    mass = weights.cumsum(-1)
    return (weights.unsqueeze(-1) * ranked).cumsum(1) / mass.unsqueeze(-1), mass


def output_budget(attention: Tensor, values: Tensor, similarity: float = 0.9) -> Tensor:
    """MBO: how few entries give an output like the whole one; int64 `[R]`. LMBO of a layer is the mean over its heads.

    MBO = min{ B : cos(o, o(B)) >= similarity }. Shapes as in `truncated_outputs`.
    Source: ZigZagKV, arXiv 2412.09036, figure 3 (the cosine and its 0.9 are our reading).
    """
    outputs, _ = truncated_outputs(attention, values)
    likeness = torch.cosine_similarity(outputs, outputs[:, -1:], dim=-1)
    reached = likeness >= similarity - 1e-12
    reached[:, -1] = True
    return reached.int().argmax(-1) + 1
