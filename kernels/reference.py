"""Attention over a cache in plain PyTorch: the oracle that every other route is compared with."""

from __future__ import annotations

import torch
from kvcompile.kernels.layout import DenseView, Queries, View
from kvcompile.kernels.spec import KernelSpec
from torch import Tensor


def row(view: View, sequence: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys `[n, D]`, values `[n, D_v]` and true positions `[n]` of one row of either layout."""
    if isinstance(view, DenseView):
        positions = view.positions[sequence, min(head, view.positions.shape[1] - 1)]
        return view.keys[sequence, head], view.values[sequence, head], positions
    start = view.starts[sequence * view.heads + head]
    stop = start + view.lengths[sequence * view.heads + head]
    return view.keys[start:stop], view.values[start:stop], view.positions[start:stop]


def attend(queries: Queries, view: View, spec: KernelSpec) -> Tensor:
    """Attention of each new token to the entries at or before it, `[B, H_q, Q, D_v]`; zeros for padding.

    O_i = sum_j softmax_j(softcap(q_i k_j * scale)) v_j over 0 <= p_i - p_j (< sliding window), in float64.
    """
    q = queries.states
    batch, heads, count, _ = q.shape
    out = None
    for b in range(batch):
        at = queries.positions[b].unsqueeze(-1)
        for h in range(heads):
            keys, values, held = row(view, b, h // spec.group)
            logits = q[b, h].double() @ keys.double().T * spec.scale
            if spec.softcap:
                logits = spec.softcap * torch.tanh(logits / spec.softcap)
            hidden = held > at
            if spec.sliding_window:
                hidden = hidden | (held <= at - spec.sliding_window)
            weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
            result = weights @ values.double()
            if out is None:
                out = q.new_zeros(batch, heads, count, values.shape[-1])
            real = slice(None) if queries.valid is None else queries.valid[b]
            out[b, h, real] = result[real].to(q.dtype)
    if out is None:
        raise ValueError("attention over an empty batch")
    return out
