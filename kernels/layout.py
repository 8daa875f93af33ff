"""How cached keys and values lie in memory, as a kernel sees them: no policy, no bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseView:
    """Rows of one length: keys `[B, H_kv, n, D]`, values `[B, H_kv, n, D_v]`, true positions `[B, H_kv or 1, n]`."""

    keys: Tensor
    values: Tensor
    positions: Tensor


@dataclass(frozen=True)
class RaggedView:
    """Rows of any length, one per (sequence, KV head), back to back with slack between them.

    keys `[T, D]`, values `[T, D_v]`, positions `[T]`; row `r = b * heads + h` is `starts[r] : starts[r] + lengths[r]`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    starts: list[int]
    lengths: list[int]
    batch: int
    heads: int


View = DenseView | RaggedView


@dataclass(frozen=True)
class Queries:
    """The new tokens: states `[B, H_q, Q, D]`, true positions `[B, Q]`, and which are real (None: all of them).

    Keys and values of the new tokens are already the last entries of their rows.
    """

    states: Tensor
    positions: Tensor
    valid: Tensor | None = None
