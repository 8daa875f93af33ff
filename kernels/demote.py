"""What a decoded token does to the two tiers of each row: it comes in high, and the weakest entry may go down or out.

Plain torch: the oracle of generated demoters, and what backends without one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from kvcompile.kernels.codecs import Encoder, decode, encode
from kvcompile.kernels.layout import RaggedView
from kvcompile.plan.storage import Codec

Encoded = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]  # keys, their scales, values, theirs, positions
NEVER = float("inf")  # received by places without an entry and by entries that always stay: none of them is weakest


class Outcome(IntEnum):
    """What happened to a row."""

    NOTHING = 0  # no token came
    GROWS = 1  # the token has a new place in the high tier
    DROPS = 2  # the weakest high entry is gone, the token has its place
    REPLACES = 3  # it took the place of the weakest low one, which is gone
    LOWERS = 4  # it has a new place in the low tier


@dataclass(frozen=True)
class DemoteSpec:
    """One specialised demoter: formats of the keys and values of either tier, channels, dtype of the new tokens."""

    high: tuple[Codec, Codec]
    low: tuple[Codec, Codec]
    head_dim: int
    value_dim: int
    dtype: str

    @property
    def name(self) -> str:
        """Readable and unique: `demote-int8t-int4t-int4t-int2t-float32-d64`."""
        formats = "-".join(codec.name for codec in (*self.high, *self.low))
        values = f"x{self.value_dim}" if self.value_dim != self.head_dim else ""
        return f"demote-{formats}-{self.dtype}-d{self.head_dim}{values}"


@dataclass(frozen=True)
class TierRows:
    """One tier: its codes, every row of them with room for one entry more, in the formats of `key` and `value`.

    The entry in place j of row r has received `received[r, j]` of the attention of the queries from `since[r, j]` on,
    both float32 `[R, places]`; where there is no entry, infinitely much.
    """

    codes: RaggedView
    key: Codec
    value: Codec
    received: Tensor
    since: Tensor


@dataclass(frozen=True)
class NewTokens:
    """Keys `[n, D]`, values `[n, D_v]` and true positions `[n]` of one new token for each of n rows, ascending."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    rows: list[int]


@dataclass(frozen=True)
class Rule:
    """When the weakest entry goes, all float32 `[R]`.

    tokens: seen by each row's sequence. below: mean attention less than which a high entry becomes low; prune: less
    than which one goes. The `recent` newest tokens and the first `sinks` are never weakest. group: query heads of a KV
    head, over which attention is averaged.
    """

    tokens: Tensor
    below: Tensor
    prune: Tensor
    recent: int
    sinks: int
    group: int


@dataclass(frozen=True)
class Demoted:
    """The outcome of each row, and the largest scales of the new tokens' keys and of their values (none: `()`)."""

    outcomes: list[int]
    scales: tuple[float, ...]


class Demoter(Protocol):
    """A way to demote: the contract of `demote`."""

    def __call__(
        self, low: TierRows, high: TierRows, new: NewTokens, sums: Tensor, rule: Rule, encoder: Encoder = encode
    ) -> Demoted:
        """Both tiers are changed in place."""
        ...


def spec_of(low: TierRows, high: TierRows, new: NewTokens) -> DemoteSpec:
    """The demoter that these need."""
    dims = new.keys.shape[-1], new.values.shape[-1]
    dtype = str(new.keys.dtype).removeprefix("torch.")
    return DemoteSpec((high.key, high.value), (low.key, low.value), *dims, dtype)


def demote(
    low: TierRows, high: TierRows, new: NewTokens, sums: Tensor, rule: Rule, encoder: Encoder = encode
) -> Demoted:
    """Count what entries have received, put each new token into the high tier, and what it pushes out where it belongs.

    Of the weakest high entry, with mean attention u, and the weakest low one, with v: (1) it is dropped if u < prune
    and u < v; else (2) it takes the place of the low one if u < below and v < prune; else (3) it becomes low if
    u < below. The token then has its place, else a new one. What becomes low is encoded again, from what its codes
    decode to.
    Source: DiffKV, arXiv 2412.03131, and its code.

    Args:
        low: the low tier.
        high: the high one.
        new: the new tokens.
        sums: what every entry has received from the newest queries, summed over the query heads of a KV head, `[R, n]`:
            those of the low tier, those of the high one, the new token.
        rule: what is too weak.
        encoder: what encodes.
    """
    rows = torch.tensor(new.rows, device=sums.device, dtype=torch.int64)
    received = _count(low, high, sums / rule.group)
    (u, weakest), (v, weakest_low) = _weakest(high, rule.tokens, rule.recent), _weakest(low, rule.tokens)
    came = torch.zeros_like(u, dtype=torch.bool).index_fill_(0, rows, True)
    drops, replaces, lowers = (x & came for x in demoted(u, v, rule.below, rule.prune))
    moved = (replaces | lowers).nonzero().squeeze(1)
    if moved.numel():
        codes = _lowered(high, low, high.codes.begins[moved] + weakest[moved], new.keys.dtype, encoder)
        standing = high.received[moved, weakest[moved]], high.since[moved, weakest[moved]]
        _put(low, moved, torch.where(replaces, weakest_low, _counts(low))[moved], codes, *standing)
    leaves = drops | replaces | lowers
    codes = (*encoder(new.keys, high.key), *encoder(new.values, high.value), new.positions)
    first = received.masked_fill(rule.tokens <= rule.sinks, NEVER)[rows]
    _put(high, rows, torch.where(leaves, weakest, _counts(high))[rows], codes, first, new.positions.float())
    outcome = came + drops.int() + 2 * replaces.int() + 3 * lowers.int()
    largest = [x[..., 0, :].abs().amax() for x in (codes[1], codes[3]) if x is not None and rows.numel()]
    return Demoted(outcome.tolist(), tuple(map(float, largest)))


def demoted(high: Tensor, low: Tensor, below: Tensor, prune: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What becomes of the weakest high entry of each row when a token comes, all `[R]`: (drops, replaces, lowers).

    high, low: mean attention of the weakest entry of either tier; below, prune: as in `Rule`.
    """
    weak = high < below
    drops = (high < prune) & (high < low)
    replaces = weak & (low < prune) & ~drops
    return drops, replaces, weak & ~drops & ~replaces


def _counts(tier: TierRows) -> Tensor:
    """Entries of each row, `[R]`: the place behind the last one."""
    return tier.codes.ends - tier.codes.begins


def _count(low: TierRows, high: TierRows, received: Tensor) -> Tensor:
    """Add what every entry has `received [R, n]`; what the new token of each row has, `[R]`."""
    before, last = _counts(low).unsqueeze(1), received.shape[1] - 1
    longest = max(low.codes.lengths)
    low.received[:, :longest].add_(received[:, :longest])
    columns = torch.arange(max(high.codes.lengths), device=received.device, dtype=torch.int64)
    high.received[:, : len(columns)].add_(received.gather(1, (before + columns).clamp(max=last)))
    return received.gather(1, (before + _counts(high).unsqueeze(1)).clamp(max=last)).squeeze(1)


def _weakest(tier: TierRows, tokens: Tensor, recent: int = 0) -> tuple[Tensor, Tensor]:
    """Of each row the least mean attention of an entry, and its place; infinity where there is none to choose."""
    received, since = (x[:, : max(tier.codes.lengths)] for x in (tier.received, tier.since))
    if not received.shape[1]:
        return torch.full_like(tokens, NEVER), torch.zeros_like(tokens, dtype=torch.int64)
    mean = received / (tokens.unsqueeze(1) - since)
    if recent:
        mean.masked_fill_(since >= (tokens - recent).unsqueeze(1), NEVER)
    least = mean.min(1)
    return least.values, least.indices


def _lowered(high: TierRows, low: TierRows, slots: Tensor, dtype: torch.dtype, encoder: Encoder) -> Encoded:
    """The high entries in `slots [n]` in the formats of the low tier: of the numbers that they decode to."""
    c = high.codes
    sides = ((c.keys, c.key_scales, high.key, low.key), (c.values, c.value_scales, high.value, low.value))
    keys, values = (
        encoder(decode(x[slots], None if scales is None else scales[slots], old, dtype), new)
        for x, scales, old, new in sides
    )
    return *keys, *values, c.positions[slots]


def _put(tier: TierRows, rows: Tensor, places: Tensor, codes: Encoded, received: Tensor, since: Tensor) -> None:
    """Write entries into `places [n]` of `rows [n]`, over what was there."""
    slots, c = tier.codes.begins[rows] + places, tier.codes
    for old, new in zip((c.keys, c.key_scales, c.values, c.value_scales, c.positions), codes, strict=True):
        if old is not None and new is not None:
            old.index_copy_(0, slots, new)
    tier.received[rows, places], tier.since[rows, places] = received, since
