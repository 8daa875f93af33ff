"""A selection as tensor operations on batches of rows, with nothing read back: `runtime.eviction` in a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.plan.plan import LayerPlan
from kvcompile.plan.selection import Allocation, LayerScores, Score
from kvcompile.runtime.history import in_moments
from kvcompile.runtime.observation import Moments, Observation

INFINITY = float("inf")


@dataclass(frozen=True)
class Entries:
    """Rows that a selection ranks: keys, values `[B, H_kv, n, D]`, true positions `[B, H_kv, n]`, -1 where empty."""

    keys: Tensor
    values: Tensor
    positions: Tensor

    def at(self, index: Tensor) -> Entries:
        """The entries `index [B, H_kv, m]`; `n` as an index means an empty one."""
        wide = index.unsqueeze(-1)
        keys, values = (
            F.pad(x, (0, 0, 0, 1)).gather(2, wide.expand(*index.shape, x.shape[-1])) for x in (self.keys, self.values)
        )
        return Entries(keys, values, F.pad(self.positions, (0, 1), value=-1).gather(2, index))


@dataclass(frozen=True)
class Asked:
    """What a selection knows besides the entries.

    queries `[B, H_q, W, D]` at `positions [W]`, those before the sequence's start at -1. tokens: seen so far; recent:
    newest ones that stay (both one number). moments: of the queries before rotation, by sequence. mean_rotation: as in
    `Observation`. carried `[B, H_kv, n]`: what a score that sums over all queries has so far (None: nothing yet).
    """

    queries: Tensor
    positions: Tensor
    tokens: Tensor
    recent: Tensor
    moments: Sequence[Moments] | None = None
    mean_rotation: Callable[[int], Tensor] | None = None
    carried: Tensor | None = None


@dataclass(frozen=True)
class _Seen(Observation):
    """What a score may look at, in a trace: `tokens` is a tensor, and no number is read back from one."""

    @property
    def alive(self) -> Tensor:
        """Entries that the next query can see, bool `[H_kv, n]`."""
        held = self.positions >= 0
        return held & (self.positions > self.tokens - self.sliding_window) if self.sliding_window else held

    def _seen_by_all(self, asked: Tensor) -> int:
        return 0

    def attention_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All queries at once: how many blocks there are would depend on the prompt."""
        yield self.query_positions, self.attention()


@dataclass(frozen=True)
class Look:
    """What a selection saw of one layer: scores, what the score carries on, and attention mass, each `[B, H_kv, n]`."""

    ranked: Tensor
    carried: Tensor | None = None
    mass: Tensor | None = None


def masses(p: LayerPlan, held: Entries, asked: Asked, measure: Score) -> Tensor:
    """Attention mass `[B, H_kv, n]`, as `measure` sees it."""
    rows = range(held.keys.shape[0])
    return torch.stack([measure.score(_observation(p, held, asked, b)).float() for b in rows])


def allotted(
    allocation: Allocation, budgets: Mapping[int, tuple[Tensor, ...]], looks: Mapping[int, Look]
) -> dict[int, Tensor]:
    """Entries of every head, int64 `[B, H_kv]` for each layer, where the scores of these layers decide.

    budgets: what a head of a layer keeps on average, and at least, each `[1]`. A layer whose budget is all it holds
    keeps that and takes no part.
    """
    found = []
    for b in range(next(iter(looks.values())).ranked.shape[0]):
        held = {i: (look.ranked[b] > -INFINITY).sum(-1) for i, look in looks.items()}
        full = {i: budgets[i][0] >= n.amax() for i, n in held.items()}
        layers = []
        for i, look in looks.items():
            mass = None if look.mass is None else look.mass[b]
            budget, lengths = (torch.where(full[i], 0, x) for x in (budgets[i][0], held[i]))
            layers.append(LayerScores(look.ranked[b], mass, lengths, budget, budgets[i][1]))
        rows = zip(looks, allocation.allot(layers), strict=True)
        found.append([torch.where(full[i], held[i], row) for i, row in rows])
    return dict(zip(looks, map(torch.stack, zip(*found, strict=True)), strict=True))


def scores(p: LayerPlan, held: Entries, asked: Asked) -> Look:
    """Scores, protected entries at +inf, dead and empty ones at -inf; and what the score carries on."""
    s = p.selection
    if s is None:
        raise RuntimeError(f"layer {p.index} selects nothing")
    found, carried = list[Tensor](), list[Tensor]()
    for b in range(held.keys.shape[0]):
        seen = _observation(p, held, asked, b)
        if s.score.needs.carries:
            carried.append(s.score.observe(seen))
            seen = replace(seen, carried=carried[-1])
        found.append(s.score.score(seen).float())
    at = held.positions
    protected = (at < s.sinks) | (at >= asked.tokens - asked.recent)
    ranked = torch.stack(found).masked_fill(protected, INFINITY)
    oldest = (asked.tokens - p.sliding_window).clamp(min=0) if p.sliding_window else 0
    return Look(ranked.masked_fill(at < oldest, -INFINITY), torch.stack(carried) if carried else None)


def _observation(p: LayerPlan, held: Entries, asked: Asked, b: int) -> _Seen:
    return _Seen(
        queries=torch.unflatten(asked.queries[b], 0, (p.kv_heads, -1)),
        query_positions=asked.positions,
        keys=held.keys[b],
        values=held.values[b],
        positions=held.positions[b],
        lengths=(held.positions[b] >= 0).sum(1),
        tokens=asked.tokens,  # type: ignore[arg-type]
        scale=p.scale,
        softcap=p.softcap,
        sliding_window=p.sliding_window,
        carried=None if asked.carried is None else asked.carried[b],
        moments=None if asked.moments is None else asked.moments[b],
        mean_rotation=asked.mean_rotation,
        layer=p.index,
    )


def moments(p: LayerPlan, unrotated: Tensor, positions: Tensor, stride: int) -> list[Moments]:
    """Of the queries before rotation `[B, H_q, T, D]` at `positions [T]`, as `runtime.history` sums them up."""
    counted = in_moments(positions, stride).float()
    count = counted.sum().clamp(min=1)
    found = []
    for queries in unrotated.float().unbind(0):
        mine = torch.unflatten(queries * counted.unsqueeze(-1), 0, (p.kv_heads, -1))
        mean = mine.sum(2) / count
        outer = mine.mT @ mine / count
        found.append(Moments(0, mean, outer - mean.unsqueeze(-1) * mean.unsqueeze(-2)))
    return found


def highest(ranked: Tensor, counts: Tensor, room: int) -> Tensor:
    """Places `[B, H_kv, room]` of each row's `counts [H_kv]` highest scores, ascending; then `n` for empty ones.

    Of equal scores the older entry stays.
    """
    n = ranked.shape[-1]
    padded = F.pad(ranked, (0, room), value=-INFINITY)
    order = padded.sort(dim=-1, descending=True, stable=True).indices[..., :room]
    empty = torch.arange(room, device=ranked.device, dtype=torch.int64) >= counts.unsqueeze(-1)
    return torch.where(empty, n, order).sort(dim=-1).values
