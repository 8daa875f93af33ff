"""Attention over a cache in plain PyTorch: the oracle that every other backend is compared with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvcompile.kernels.codecs import decode
from kvcompile.kernels.layout import DenseView, PagedView, Queries, RaggedView, Segment, View, parts
from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.plan.window import oldest

QUERY_BLOCK = 256


def row(
    view: View, spec: KernelSpec, sequence: int, head: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys `[n, D]`, values `[n, D_v]` and true positions `[n]` of one row, decoded, whatever it lies in."""
    latent = spec.value_dim if spec.latent else 0
    stretches = [_stretch(s, p, sequence, head, dtype, latent) for s, p in zip(parts(view), spec.parts, strict=True)]
    if len(stretches) == 1:
        return stretches[0]
    keys, values, positions = zip(*stretches, strict=True)
    return torch.cat(keys), torch.cat(values), torch.cat(positions)


def _stretch(
    view: Segment, part: Part, b: int, h: int, dtype: torch.dtype, latent: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one part. latent: so many last channels of the keys are the values (0: these are held by themselves)."""
    key, value = part.key, part.value
    if isinstance(view, DenseView):
        key_scales, value_scales = (None if x is None else x[b, h] for x in (view.key_scales, view.value_scales))
        keys = decode(view.keys[b, h], key_scales, key, dtype)
        values = keys[:, -latent:] if latent else decode(view.values[b, h], value_scales, value, dtype)
        return keys, values, view.positions[b, min(h, view.positions.shape[1] - 1)]
    at = _entries(view, b * view.heads + h)

    def scales(x: Tensor | None, group: int, channel: bool) -> Tensor | None:
        return None if x is None else x[at[::group] // group if channel else at]

    keys = decode(view.keys[at], scales(view.key_scales, key.group, key.axis == "channel"), key, dtype)
    if latent:
        return keys, keys[:, -latent:], view.positions[at]
    value_scales = scales(view.value_scales, value.group, value.axis == "channel")
    return keys, decode(view.values[at], value_scales, value, dtype), view.positions[at]


def _entries(view: RaggedView | PagedView, r: int) -> Tensor:
    """Where the entries of row `r` lie, `[n]`."""
    j = torch.arange(view.lengths[r], device=view.keys.device, dtype=torch.int64)
    if isinstance(view, PagedView):
        return view.table[r].long()[j // view.page] * view.page + j % view.page
    return view.starts[r] + j


def biases(view: View, b: int, h: int) -> Tensor:
    """What is added to the logits of the entries of one row, `[n]`. Raises ValueError where a part has no bias."""
    per_part = []
    for s in parts(view):
        bias = required(s.bias, "a bias of each entry")
        if isinstance(s, DenseView):
            per_part.append(bias[b, min(h, bias.shape[1] - 1)])
        else:
            per_part.append(bias[_entries(s, b * s.heads + h)])
    return torch.cat(per_part)


def required(x: Tensor | None, what: str) -> Tensor:
    """A tensor that a spec asks for. Raises ValueError where the caller brings none."""
    if x is None:
        raise ValueError(f"the spec has {what}, and the call brings no tensor for it")
    return x


def softmax(logits: Tensor, sinks: Tensor | None = None) -> Tensor:
    """softmax over the last dimension, with one more logit in its denominator, `sinks` (broadcast), which weighs in
    and is then dropped.
    """
    if sinks is None:
        return logits.softmax(-1)
    return torch.cat((logits, sinks.to(logits).expand(*logits.shape[:-1], 1)), -1).softmax(-1)[..., :-1]


def fall(slopes: Tensor, positions: Tensor, at: Tensor, scale: float, rounded: bool) -> Tensor:
    """What logits of queries at `at` to entries at `positions` get by `slopes` m (broadcast): m (p_j - p).

    rounded: scale * bfloat16(bfloat16(m / scale) * bfloat16(p_j)), which lacks -m p: no softmax sees what all share.
    """
    if not rounded:
        return slopes * (positions - at)
    return ((slopes / scale).bfloat16() * positions.bfloat16()).to(slopes.dtype) * scale


def hidden(positions: Tensor, at: Tensor, spec: KernelSpec, until: Tensor | None = None) -> Tensor:
    """Which entries at true positions `positions` a query at `at` does not see, nor after `until` (None: `at`)."""
    unseen = positions > (at if until is None else until)
    if spec.sliding_window:
        unseen = unseen | (positions < oldest(at, spec.sliding_window, spec.chunked))
    return unseen


def attend(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    """Attention of each new token to the entries at or before it (or `until`), `[B, H_q, Q, D_v]`; zeros for padding.

    O_i = sum_j softmax_j(softcap(q_i k_j * scale) + b_j + m (p_j - p_i)) v_j over 0 <= p_i - p_j (< sliding window, or
    p_j in the chunk of p_i), in float64; with a sink, its exp is one more term of the denominator. Where the spec has
    `scores`, the attention that each entry received, summed over the group's queries and the new tokens, is added to
    `sums [R, longest row]` (float32).
    """
    q = queries.states
    batch, heads, count, _ = q.shape
    out = q.new_zeros(batch, heads, count, spec.value_dim)
    sinks = required(queries.sinks, "a learned sink").double() if spec.sink else None
    slopes = required(queries.slopes, "a slope of each head").double() if spec.alibi else None
    for b in range(batch):
        at = queries.positions[b].unsqueeze(-1)
        until = None if queries.until is None else queries.until[b].unsqueeze(-1)
        real = slice(None) if queries.valid is None else queries.valid[b]
        for h in range(heads // spec.group):
            keys, values, positions = row(view, spec, b, h)
            unseen = hidden(positions, at, spec, until)
            bias = biases(view, b, h) if spec.bias else 0.0
            for g in range(h * spec.group, (h + 1) * spec.group):
                logits = q[b, g].double() @ keys.T * spec.scale
                if spec.softcap:
                    logits = spec.softcap * torch.tanh(logits / spec.softcap)
                if slopes is not None:
                    logits = logits + fall(slopes[g], positions, at, spec.scale, spec.rounded)
                logits = (logits + bias).masked_fill(unseen, float("-inf"))
                weights = softmax(logits, None if sinks is None else sinks[g])
                out[b, g, real] = (weights @ values)[real].to(q.dtype)
                if sums is not None:
                    sums[b * (heads // spec.group) + h, : keys.shape[0]] += weights[real].sum(0).to(sums.dtype)
    return out


def column_sums(queries: Queries, view: View, spec: KernelSpec, sums: Tensor) -> None:
    """Add to `sums [R, longest row]` what each entry receives from `queries`, as `attend` does, a few at a time."""
    for start in range(0, queries.states.shape[2], QUERY_BLOCK):
        some = slice(start, start + QUERY_BLOCK)
        valid = None if queries.valid is None else queries.valid[:, some]
        new = replace(queries, states=queries.states[:, :, some], positions=queries.positions[:, some], valid=valid)
        attend(new, view, spec, sums)
