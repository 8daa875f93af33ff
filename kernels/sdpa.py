"""Attention over a cache by library calls: SDPA with the GQA group folded into query rows, no repeated K/V.

Folding `[B, H_kv * g, 1, D]` to `[B, H_kv, g, D]` reads each key once for its whole group.
Queries of a prefill run in blocks, so that neither a mask nor a score matrix of prompt x prompt is ever held.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels import reference
from kvcompile.kernels.layout import DenseView, Queries, RaggedView, View, parts
from kvcompile.kernels.spec import KernelSpec
from kvcompile.plan.window import oldest

QUERY_BLOCK = 512


def supports(spec: KernelSpec, dtype: torch.dtype) -> bool:
    """All but `scores`, which no library call computes."""
    return not spec.scores


def attend(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    """Same contract as `reference.attend`, in the dtype of the queries; quantized and paged rows are decoded first.

    Raises KvcompileError for a spec with `scores`, which no library call computes.
    """
    if not supports(spec, queries.states.dtype):
        raise KvcompileError("kernels=sdpa computes no scores", spec.name, "set kernels=auto")
    view = _plain(view, spec, queries.states.dtype)
    if spec.latent:  # library calls want values as wide as keys: the rows themselves, of which the end is kept
        return _attended(queries, replace(view, values=view.keys), spec)[..., -spec.value_dim :]
    return _attended(queries, view, spec)


def _attended(queries: Queries, view: DenseView | RaggedView, spec: KernelSpec) -> Tensor:
    if isinstance(view, DenseView):
        return _dense(queries, view, spec)
    if queries.states.shape[2] == 1 and queries.valid is None:
        return _ragged_step(queries, view, spec)
    return _ragged_prefill(queries, view, spec)


def _plain(view: View, spec: KernelSpec, dtype: torch.dtype) -> DenseView | RaggedView:
    """The same rows uncoded, contiguous and in one part; only views of plain floats are not copied."""
    if isinstance(view, DenseView | RaggedView) and not (spec.parts[0].key.scaled or spec.parts[0].value.scaled):
        return view
    first = parts(view)[0]
    batch, heads = first.keys.shape[:2] if isinstance(first, DenseView) else (first.batch, first.heads)
    each = [(b, h) for b in range(batch) for h in range(heads)]
    rows = [reference.row(view, spec, b, h, dtype) for b, h in each]
    added = [reference.biases(view, b, h) for b, h in each] if spec.bias else None
    lengths = [r[0].shape[0] for r in rows]
    if len(set(lengths)) == 1:
        keys, values, positions = (torch.unflatten(torch.stack(x), 0, (batch, heads)) for x in zip(*rows, strict=True))
        bias = None if added is None else torch.unflatten(torch.stack(added), 0, (batch, heads))
        return DenseView(keys, values, positions, bias=bias)
    keys, values, positions = (torch.cat(x) for x in zip(*rows, strict=True))
    bias = None if added is None else torch.cat(added)
    ends = torch.tensor(lengths, device=keys.device, dtype=torch.int64).cumsum(0)
    starts = [int(e) - n for e, n in zip(ends, lengths, strict=True)]
    begins = torch.tensor(starts, device=keys.device, dtype=torch.int64)
    return RaggedView(keys, values, positions, starts, lengths, batch, heads, begins, ends, bias=bias)


def _explicit(spec: KernelSpec) -> bool:
    """Whether the softmax has what SDPA has no argument for (a bias would do, but with no sink beside it)."""
    return bool(spec.softcap or spec.sink or spec.bias or spec.alibi)


def _added(queries: Queries, bias: Tensor | None, positions: Tensor, spec: KernelSpec) -> Tensor | None:
    """What is added to logits `[B, H_kv, g Q, n]` of keys with a `bias`, at `positions [B, H_kv or 1, n]`."""
    added = reference.required(bias, "a bias of each entry").unsqueeze(-2) if spec.bias else None
    if not spec.alibi:
        return added
    slopes = reference.required(queries.slopes, "a slope of each head").view(1, -1, spec.group, 1, 1)
    entries_at, at = positions[:, :, None, None, :], queries.positions[:, None, None, :, None]
    falls = reference.fall(slopes, entries_at, at, spec.scale, spec.rounded)
    falls = falls.expand(*falls.shape[:3], at.shape[3], -1).flatten(2, 3)  # rounded, it is the same for all queries
    return falls if added is None else added + falls


def _sinks(queries: Queries, spec: KernelSpec) -> Tensor | None:
    """Sink logits by KV head, `[H_kv, g, 1]`; None: the spec has none."""
    return reference.required(queries.sinks, "a learned sink").view(-1, spec.group, 1) if spec.sink else None


def _dense(queries: Queries, view: DenseView, spec: KernelSpec) -> Tensor:
    q, at = queries.states, queries.positions
    count, entries = q.shape[2], view.keys.shape[2]
    if count == 1:
        return _folded(queries, view, _window_mask(at, view.positions, spec), spec)
    until = queries.until
    if count == entries and until is None and not _explicit(spec) and not _windowed(count, spec):
        return F.scaled_dot_product_attention(
            q, view.keys, view.values, is_causal=True, scale=spec.scale, enable_gqa=spec.group > 1
        )
    blocks = []
    for start in range(0, count, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, count)
        # entries of later new tokens lie behind `seen`: no block needs them, but where tokens see ahead
        seen = entries - count + stop if until is None else entries
        ends = None if until is None else until[:, start:stop]
        block = replace(queries, states=q[:, :, start:stop], positions=at[:, start:stop], until=ends)
        bias = None if view.bias is None else view.bias[:, :, :seen]
        part = DenseView(view.keys[:, :, :seen], view.values[:, :, :seen], view.positions[:, :, :seen], bias=bias)
        blocks.append(_folded(block, part, _mask(block.positions, part.positions, spec, ends), spec))
    return torch.cat(blocks, 2)


def _windowed(count: int, spec: KernelSpec) -> bool:
    """Whether a window may hide some of `count` entries from one another."""
    return bool(spec.sliding_window) and (spec.chunked or count > (spec.sliding_window or 0))


def _folded(queries: Queries, view: DenseView, mask: Tensor | None, spec: KernelSpec) -> Tensor:
    """`[B, H_q, Q, D]` over keys `[B, H_kv, n, D]` with the group's queries as rows; mask `[B, 1 or H_kv, Q, n]`."""
    q, keys, values = queries.states, view.keys, view.values
    batch, heads, count, dim = q.shape
    rows = q.reshape(batch, -1, spec.group * count, dim)
    if mask is not None and count > 1:
        mask = mask.unsqueeze(2).expand(-1, -1, spec.group, -1, -1).flatten(2, 3)
    if _explicit(spec):
        sinks = _sinks(queries, spec)
        sinks = sinks if sinks is None or count == 1 else sinks.repeat_interleave(count, 1)
        out = _by_hand(rows, keys, values, mask, spec, sinks, _added(queries, view.bias, view.positions, spec))
    else:
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=spec.scale)
    return out.reshape(batch, heads, count, -1)


def _by_hand(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    spec: KernelSpec,
    sinks: Tensor | None,
    added: Tensor | None,
) -> Tensor:
    """SDPA has neither soft-cap nor sink: matmul, tanh, softmax in float32, matmul.

    sinks: those of the `rows [B, H_kv, r, D]`, `[H_kv, r, 1]`; added: to the logits `[B, H_kv, r, n]`.
    """
    logits = torch.matmul(rows, keys.transpose(-1, -2)).float() * spec.scale
    if spec.softcap:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    if added is not None:
        logits = logits + added
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return torch.matmul(reference.softmax(logits, sinks).to(values.dtype), values)


def _mask(at: Tensor, entries_at: Tensor, spec: KernelSpec, until: Tensor | None = None) -> Tensor:
    """Visible entries `[B, H_kv or 1, Q, n]` for queries at `at [B, Q]`; `entries_at [B, H_kv or 1, n]`.

    until: the last position that each query sees, `[B, Q]` (None: its own).
    """
    queries_at, entries_at = at[:, None, :, None], entries_at[:, :, None, :]
    visible = entries_at <= (queries_at if until is None else until[:, None, :, None])
    if spec.sliding_window:
        visible = visible & (entries_at >= oldest(queries_at, spec.sliding_window, spec.chunked))
    return visible


def _window_mask(at: Tensor, entries_at: Tensor, spec: KernelSpec) -> Tensor | None:
    """One new token sees everything held, unless a sliding window hides what has not been trimmed yet.

    Rows ascend, so the first entry tells; their number does not, as an eviction leaves gaps.
    """
    if not spec.sliding_window:
        return None
    if bool((entries_at[:, :, 0] >= oldest(at, spec.sliding_window, spec.chunked)).all()):
        return None
    return _mask(at, entries_at, spec)


def _ragged_step(queries: Queries, view: RaggedView, spec: KernelSpec) -> Tensor:
    """One new token: each row's keys are contiguous, so each row is one SDPA call without a copy or a mask."""
    q = queries.states
    batch, heads, _, dim = q.shape
    rows = q.reshape(batch * view.heads, 1, 1, spec.group, dim)
    sinks = _sinks(queries, spec)
    outs = []
    for i, (start, length) in enumerate(zip(view.starts, view.lengths, strict=True)):
        keys = view.keys[None, None, start : start + length]
        values = view.values[None, None, start : start + length]
        entries_at = view.positions[None, None, start : start + length]
        mask = _window_mask(queries.positions[i // view.heads, None], entries_at, spec)
        if _explicit(spec):
            row_sinks = None if sinks is None else sinks[i % view.heads]
            bias = None if view.bias is None else view.bias[None, None, start : start + length]
            one = _of_heads(queries, i // view.heads, i % view.heads, spec)
            outs.append(_by_hand(rows[i], keys, values, mask, spec, row_sinks, _added(one, bias, entries_at, spec)))
        else:
            outs.append(_one_row(rows[i], keys, values, mask, spec))
    return torch.cat(outs, 1).reshape(batch, heads, 1, -1)


def _one_row(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, spec: KernelSpec) -> Tensor:
    """SDPA of one row, all `[1, 1, ., D]`.

    On a CPU the row is handed over twice, as a view: alone it runs outside SDPA's parallel loop, where each small
    matrix product wakes all threads, which took four times as long (measured on caches of 4k tokens).
    """
    copies = 2 if q.device.type == "cpu" else 1
    q, keys, values = (x.expand(1, copies, -1, -1) for x in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=spec.scale)[:, :1]


def _ragged_prefill(queries: Queries, view: RaggedView, spec: KernelSpec) -> Tensor:
    """Each sequence alone, exactly as if it had come in a batch of one; heads of one length in one call."""
    q = queries.states
    out = q.new_zeros(*q.shape[:3], view.values.shape[-1])
    for b in range(view.batch):
        real = slice(None) if queries.valid is None else queries.valid[b].nonzero().squeeze(-1)
        at, ends = queries.positions[b : b + 1, real], None if queries.until is None else queries.until[b : b + 1, real]
        new = replace(queries, states=q[b : b + 1, :, real], positions=at, valid=None, until=ends)
        if not new.states.shape[2]:
            continue
        rows = range(b * view.heads, (b + 1) * view.heads)
        lengths = {view.lengths[i] for i in rows}
        if len(lengths) == 1:
            out[b : b + 1, :, real] = _dense(new, _stacked(view, rows), spec)
            continue
        for h, i in enumerate(rows):
            query_heads = slice(h * spec.group, (h + 1) * spec.group)
            one = _of_heads(new, 0, h, spec)
            out[b : b + 1, query_heads, real] = _dense(one, _stacked(view, range(i, i + 1)), spec)
    return out


def _of_heads(queries: Queries, sequence: int, head: int, spec: KernelSpec) -> Queries:
    """What one KV head of one sequence is asked."""
    one, group = slice(sequence, sequence + 1), slice(head * spec.group, (head + 1) * spec.group)
    sinks, slopes = (None if x is None else x[group] for x in (queries.sinks, queries.slopes))
    until = None if queries.until is None else queries.until[one]
    return Queries(queries.states[one, group], queries.positions[one], sinks=sinks, slopes=slopes, until=until)


def _stacked(view: RaggedView, rows: range) -> DenseView:
    """Rows of equal length as a dense view of one sequence."""

    def stack(flat: Tensor) -> Tensor:
        return torch.stack([flat[view.starts[i] : view.starts[i] + view.lengths[i]] for i in rows]).unsqueeze(0)

    bias = None if view.bias is None else stack(view.bias)
    return DenseView(stack(view.keys), stack(view.values), stack(view.positions), bias=bias)
