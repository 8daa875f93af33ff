"""Toy: attention in float64, one row of the cache after the other, which counts its calls."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from kvcompile.errors import KvcompileError
from kvcompile.kernels import reference
from kvcompile.kernels.backend import Backend

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.kernels.layout import Queries, View
    from kvcompile.kernels.spec import KernelSpec

CALLS: Counter[str] = Counter()  # by the name of the spec


def ready(device: torch.device) -> None:
    """Raise KvcompileError unless the model is on a CPU."""
    if device.type != "cpu":
        raise KvcompileError("kernels=toy runs on a CPU", f"a model on {device.type}", "set kernels=auto")


def supports(spec: KernelSpec, dtype: torch.dtype) -> bool:
    """No sums for scores, and no variants of attention but soft-caps."""
    return not (spec.scores or spec.sink or spec.bias)


def attend(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    """softmax(softcap(q k^T * scale)) v over what each query sees, `[B, H_q, Q, D_v]`."""
    CALLS[spec.name] += 1
    batch, heads, count, _ = queries.states.shape
    out = queries.states.new_zeros(batch, heads, count, spec.value_dim)
    for b in range(batch):
        for h in range(heads // spec.group):
            keys, values, positions = reference.row(view, spec, b, h)  # [n, D], [n, D_v], [n], dequantized
            group = slice(h * spec.group, (h + 1) * spec.group)
            logits = queries.states[b, group].double() @ keys.T * spec.scale  # [g, Q, n]
            if spec.softcap:
                logits = spec.softcap * torch.tanh(logits / spec.softcap)
            unseen = reference.hidden(positions, queries.positions[b].unsqueeze(-1), spec)
            weights = logits.masked_fill(unseen, float("-inf")).softmax(-1).nan_to_num()
            out[b, group] = (weights @ values).to(out.dtype)
    return out


TOY = Backend("toy", attend, ready=ready, supports=supports, differentiable=True)
