"""How cached keys and values lie in memory, as a kernel sees them: no policy, no bookkeeping.

Codes and scales are as `kvcompile.plan.storage.Codec` says. Scales (float16) of entry t: axis `token`
`[t, P, D / group]`, axis `channel` `[t // group, P, D]`, where P counts the parameters of the format: 2 (scale, zero),
or 1 (scale). Formats without scales have None.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class DenseView:
    """Rows of one length: keys `[B, H_kv, n, W]`, values `[B, H_kv, n, W_v]`, true positions `[B, H_kv or 1, n]`.

    Scales have `[B, H_kv]` in front. Rows lie at one stride (slices of `[B, H_kv, room, ...]`).
    `bias [B, H_kv, n]` (float32) is added to the logits of an entry, in a spec that says so; so it is in other layouts,
    where it lies as positions do.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class RaggedView:
    """Rows of any length, one per (sequence, KV head), back to back with slack between them.

    keys `[T, W]`, values `[T, W_v]`, positions `[T]`; row `r = b * heads + h` is `starts[r] : starts[r] + lengths[r]`.
    Starts are multiples of the groups that share scales along tokens. `begins`, `ends`: the same as int64 tensors `[R]`
    on the cache's device, `ends[r] = starts[r] + lengths[r]`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    starts: list[int]
    lengths: list[int]
    batch: int
    heads: int
    begins: Tensor
    ends: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class PagedView:
    """Rows of any length in pages: entry j of row r is entry `table[r, j // page] * page + j % page` of the pools.

    keys `[pages * page, W]`, values, positions `[pages * page]`; table `[R, longest row in pages]` int32 (entries past
    a row's last page are never read), `counts [R]` int64, the lengths as a tensor.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    table: Tensor
    lengths: list[int]
    batch: int
    heads: int
    page: int
    counts: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    bias: Tensor | None = None


Segment = DenseView | RaggedView | PagedView


@dataclass(frozen=True)
class MixedView:
    """Each row is its entries in the first part, then those in the second, and so on."""

    parts: tuple[Segment, ...]


View = Segment | MixedView


def parts(view: View) -> tuple[Segment, ...]:
    """The stretches of every row, oldest first."""
    return view.parts if isinstance(view, MixedView) else (view,)


def longest(view: View) -> int:
    """Entries of the longest row, those of all its parts."""
    alike = sum(s.keys.shape[2] for s in parts(view) if isinstance(s, DenseView))
    others = [s.lengths for s in parts(view) if not isinstance(s, DenseView)]
    return alike + max(map(sum, zip(*others, strict=True)), default=0)


def view_bytes(view: View, latent: bool = False) -> int:
    """Bytes of keys, values and scales that attention to a view reads. latent: values are channels of the keys."""
    return sum(_segment_bytes(s, latent) for s in parts(view))


def _segment_bytes(s: Segment, latent: bool) -> int:
    axis, count = (2, s.keys.shape[:3].numel()) if isinstance(s, DenseView) else (0, sum(s.lengths))
    total = 0
    for x in (s.keys, None if latent else s.values, s.key_scales, s.value_scales):
        if x is not None and count:
            tokens = s.keys.shape[axis] // x.shape[axis]  # that share one entry of it
            total += count // tokens * prod(x.shape[axis + 1 :]) * x.element_size()
    return total


@dataclass(frozen=True)
class Queries:
    """The new tokens: states `[B, H_q, Q, D]`, true positions `[B, Q]`, and which are real (None: all of them).

    Keys and values of the new tokens are already the last entries of their rows. `sinks [H_q]` (float32): the learned
    logits of the query heads, in a spec that has them. `slopes [H_q]` (float32): what logits of a query head fall by
    with every token of distance, in a spec with `alibi`. `until [B, Q]`: the last position that each token sees (None:
    its own), for backends that say `sees_ahead`.
    """

    states: Tensor
    positions: Tensor
    valid: Tensor | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    until: Tensor | None = None
