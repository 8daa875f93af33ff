"""A selection as tensor operations on batches of rows, with nothing read back: `runtime.eviction` in a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.plan.plan import LayerPlan
from kvcompile.plan.selection import Allocation, LayerScores, Score
from kvcompile.runtime.observation import Moments, Observation
from kvcompile.runtime.selection import candidates, in_moments, moments, protect, split


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
class Inputs:
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
        there = self.positions >= 0
        return there & (self.positions > self.tokens - self.sliding_window) if self.sliding_window else there

    def _seen_by_all(self, at: Tensor) -> int:
        return 0

    def attention_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All queries at once: how many blocks there are would depend on the prompt."""
        yield self.query_positions, self.attention()


@dataclass(frozen=True)
class BatchScores:
    """Of one layer: scores, what the score carries on, and attention mass, each `[B, H_kv, n]`; lengths `[B, H_kv]`."""

    scores: Tensor
    lengths: Tensor
    carried: Tensor | None = None
    mass: Tensor | None = None


def masses(p: LayerPlan, entries: Entries, inputs: Inputs, measure: Score) -> Tensor:
    """Attention mass `[B, H_kv, n]`, as `measure` sees it."""
    rows = range(entries.keys.shape[0])
    return torch.stack([measure.score(_observation(p, entries, inputs, b)).float() for b in rows])


def allotted(
    allocation: Allocation, budgets: Mapping[int, tuple[Tensor, ...]], layers: Mapping[int, BatchScores]
) -> dict[int, Tensor]:
    """Entries of every head, int64 `[B, H_kv]` for each layer, where the scores of these layers decide.

    budgets: what a head of a layer keeps on average, and at least, each `[1]`. A layer whose budget is all it holds
    keeps that and takes no part.
    """
    rows = []
    for b in range(next(iter(layers.values())).scores.shape[0]):
        lengths = {i: layer.lengths[b] for i, layer in layers.items()}
        full = {i: budgets[i][0] >= n.amax() for i, n in lengths.items()}
        short = []
        for i, layer in layers.items():
            mass = None if layer.mass is None else layer.mass[b]
            budget, count = (torch.where(full[i], 0, x) for x in (budgets[i][0], lengths[i]))
            short.append(LayerScores(layer.scores[b], mass, count, budget, budgets[i][1]))
        counts = zip(layers, split(allocation, short), strict=True)
        rows.append([torch.where(full[i], lengths[i], count) for i, count in counts])
    return dict(zip(layers, map(torch.stack, zip(*rows, strict=True)), strict=True))


def score_entries(p: LayerPlan, entries: Entries, inputs: Inputs) -> BatchScores:
    """Scores, protected entries at +inf, dead and empty ones at -inf; and what the score carries on."""
    s = p.selection
    if s is None:
        raise RuntimeError(f"layer {p.index} selects nothing")
    scores: list[Tensor] = []
    carried: list[Tensor] = []
    for b in range(entries.keys.shape[0]):
        seen = _observation(p, entries, inputs, b)
        if s.score.needs.carries:
            carried.append(s.score.observe(seen))
            seen = replace(seen, carried=carried[-1])
        scores.append(s.score.score(seen).float())
    among = candidates(entries.positions, inputs.tokens, p.sliding_window)
    ranked = protect(torch.stack(scores), entries.positions, among, inputs.tokens, s.sinks, inputs.recent)
    return BatchScores(ranked, among.sum(-1), torch.stack(carried) if carried else None)


def _observation(p: LayerPlan, entries: Entries, inputs: Inputs, b: int) -> _Seen:
    return _Seen(
        queries=torch.unflatten(inputs.queries[b], 0, (p.kv_heads, -1)),
        query_positions=inputs.positions,
        keys=entries.keys[b],
        values=entries.values[b],
        positions=entries.positions[b],
        lengths=(entries.positions[b] >= 0).sum(1),
        tokens=inputs.tokens,  # type: ignore[arg-type]
        scale=p.scale,
        softcap=p.softcap,
        sliding_window=p.sliding_window,
        carried=None if inputs.carried is None else inputs.carried[b],
        moments=None if inputs.moments is None else inputs.moments[b],
        mean_rotation=inputs.mean_rotation,
        layer=p.index,
    )


def query_moments(p: LayerPlan, unrotated: Tensor, positions: Tensor, stride: int) -> list[Moments]:
    """Of the queries before rotation `[B, H_q, T, D]` at `positions [T]`, as `runtime.history` sums them up."""
    counted = in_moments(positions, stride).float()
    count = counted.sum().clamp(min=1)
    chosen = unrotated.float() * counted.unsqueeze(-1)
    return [moments(count, x.sum(1), x.mT @ x, p.kv_heads) for x in chosen.unbind(0)]
