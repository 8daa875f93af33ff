"""The run-time side of a selection: score a layer, split the budget, keep what it allows, free the rest.

Everything happens per sequence and per KV head, so that a batch of N is N batches of one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from kvcompile.kernels.demote import Rule
from kvcompile.kernels.layout import Queries
from kvcompile.plan.plan import LayerPlan
from kvcompile.plan.selection import LayerScores, Score, Selection, Tiers
from kvcompile.runtime.cache import TRIM_EVERY, Step
from kvcompile.runtime.layer import LayerCache
from kvcompile.runtime.observation import Observation
from kvcompile.runtime.positions import _close_ranks, mean_rotation, rotation
from kvcompile.runtime.selection import candidates, high_counts, highest, protect, split
from kvcompile.stores.base import Store
from kvcompile.stores.encoded.tier import Received
from kvcompile.stores.factory import in_order, tiered

SequenceScores = list["LayerScores | None"] | None
"""One entry per sequence (None: it keeps everything); None as a whole where no selection is due."""


@dataclass(frozen=True)
class _Layer:
    """One layer at one step: what every function here needs."""

    kv: LayerCache
    plan: LayerPlan
    selection: Selection
    step: Step
    window_attention: dict[int, Tensor | None] = field(
        default_factory=dict
    )  # by how many queries: what a kernel has added up


@torch.no_grad()
def observe(
    kv: LayerCache,
    queries: Tensor,
    unrotated: Tensor,
    step: Step,
    plan: LayerPlan,
    sinks: Tensor | None = None,
) -> SequenceScores:
    """Remember what the score will need of the new queries `[B, H_q, Q, D]`; its scores where a selection is due.

    `sinks [H_q]`: those of the query heads, in an attention that has them.
    """
    s = plan.selection
    if s is None:
        return None
    layer = _Layer(kv, plan, s, step)
    kv.history.sinks = sinks
    attentive = step.prefill or s.schedule.decode_every > 0
    if not attentive:
        return None
    needs, summed = s.score.needs, kv.sums_wanted(queries, step)
    keep = _queries_needed(s, summed)
    if needs.moments:
        kv.history.add_moments(unrotated, step.positions, step.valid, needs.moments)
        step.cache.summed()
    if keep != 0:
        kv.history.remember(queries, step.positions, step.valid, keep, counted=summed)
    due = step.due(s.schedule.decode_every, s.schedule.between_chunks)
    if step.prefill or due:
        _carry(layer, due)
    every = step.concerned or [True] * kv.held.batch
    concerned = kv.history.arrive(step.valid, kv.held.batch, due) if step.prefill else every
    scores = [_score_sequence(layer, b) if this else None for b, this in enumerate(concerned)] if due else None
    if not needs.carries:
        kv.history.column_sums = None
    if (step.last and step.prefill and not s.schedule.decode_every and not step.withheld) or (due and s.demotes):
        kv.history.forget()  # where attention is counted, each query counts once
    return scores


@torch.no_grad()
def score_remembered(
    kv: LayerCache, step: Step, plan: LayerPlan, concerned: list[bool] | None = None
) -> SequenceScores:
    """Scores of every sequence (of those `concerned`) from the queries remembered so far, be a selection due or not."""
    if plan.selection is None:
        return None
    layer = _Layer(kv, plan, plan.selection, step)
    _carry(layer, due=True)
    return [_score_sequence(layer, b) if concerned is None or concerned[b] else None for b in range(kv.held.batch)]


def observation(kv: LayerCache, step: Step, plan: LayerPlan, score: Score) -> Observation:
    """What `score` sees of the one sequence that a layer holds, and of the queries remembered so far."""
    if plan.selection is None:
        raise RuntimeError(f"layer {plan.index} selects nothing")
    return _observation(_Layer(kv, plan, plan.selection, step), 0, score)


def _carry(layer: _Layer, due: bool) -> None:
    """Let a score that carries state count the queries that came since it last did.

    Where no selection is `due`, those of an unfinished chunk wait.
    """
    s, history, seen = layer.selection, layer.kv.history, layer.step.cache.seen
    if not s.score.needs.carries or s.replays:  # a replay does that itself
        return
    unfinished = None if due else _unfinished(layer)
    left = unfinished or [0] * len(seen)
    history.carried = [s.score.observe(_observation(layer, b, s.score, without)) for b, without in enumerate(left)]
    layer.step.cache.summed()
    history.counted(s.uncertainty.needs.queries or 0 if s.uncertainty else 0, unfinished)


def _unfinished(layer: _Layer) -> list[int] | None:
    """How many of the newest queries of each sequence are of an unfinished chunk; None where none can be."""
    length = layer.selection.score.needs.together(layer.plan.sliding_window)
    if length == 1:
        return None
    uncounted, seen = layer.kv.history.uncounted, layer.step.cache.seen
    return [min(uncounted(b), tokens % length if length else tokens) for b, tokens in enumerate(seen)]


def _queries_needed(s: Selection, summed: bool) -> int | None:
    needs = s.score.needs
    counts = [0 if s.replays or (summed and needs.carries) else needs.queries]
    if s.uncertainty:
        counts.append(s.uncertainty.needs.queries)
    return None if None in counts else max(n for n in counts if n is not None)


def _observation(layer: _Layer, b: int, score: Score, without: int = 0) -> Observation:
    """What a score sees of one sequence; `without` so many of the newest queries."""
    kv, plan, step = layer.kv, layer.plan, layer.step
    needs, kernels = score.needs, step.cache.kernels
    keys, values, positions, lengths = kv.held.sequence(b)
    queries, query_positions = _queries(layer, b, score, keys, positions, without)
    return Observation(
        queries=queries,
        query_positions=query_positions,
        keys=keys,
        values=values,
        positions=positions,
        lengths=torch.tensor(lengths, device=keys.device, dtype=torch.int64),
        tokens=step.cache.seen[b],
        scale=plan.scale,
        softcap=plan.softcap,
        sliding_window=plan.sliding_window,
        chunked=plan.chunked,
        sinks=None if kv.history.sinks is None else kv.history.sinks.view(keys.shape[0], -1),
        slopes=kernels.slopes(plan.index, keys.device, keys.shape[0]),
        rounded=plan.alibi_rounded,
        carried=kv.history.carry(b, keys.shape[1]),
        column_sums=kv.history.gained(b, keys.shape[1], kernels.group(plan.index)) if needs.reduce == "sum" else None,
        window_attention=_window_attention(layer, b, score, keys.shape[1]),
        moments=kv.history.moments(b, keys.shape[0]) if needs.moments else None,
        mean_rotation=partial(mean_rotation, step, plan, b),
        rotation=partial(rotation, step, plan),
        ghost=step.cache.backend.ghost,
        layer=plan.index,
    )


def _window_attention(layer: _Layer, b: int, score: Score, entries: int) -> Tensor | None:
    """Mean attention of the newest queries of one sequence, `[H_kv, entries]`; None where no kernel has added it up."""
    window = score.needs.queries
    if score.needs.reduce != "mean" or not window:
        return None
    if window not in layer.window_attention:
        layer.window_attention[window] = _added_up(layer, window)
    of_all = layer.window_attention[window]
    return None if of_all is None else of_all[b, :, :entries]


def _added_up(layer: _Layer, window: int) -> Tensor | None:
    """The same of all sequences in one pass, `[B, H_kv, longest row]`: no queries x entries are ever held.

    None where padding lies between the queries, or the backend has no kernel for it.
    """
    kv, cache, index = layer.kv, layer.step.cache, layer.plan.index
    store, newest = kv.held, kv.history.newest(window)
    add = cache.kernels.column_sums(index, store.parts, newest[0].dtype) if newest is not None else None
    if newest is None or add is None or not in_order(store):
        return None
    sums = torch.zeros(store.batch * store.heads, max(store.lengths), device=store.device, dtype=torch.float32)
    spec, slopes = cache.kernels.window_spec(index, store.parts), cache.kernels.slopes(index, store.device)
    add(Queries(*newest, sinks=kv.history.sinks, slopes=slopes), store.view(), spec, sums)
    return torch.unflatten(sums.div_(spec.group * newest[0].shape[2]), 0, (store.batch, store.heads))


def _queries(
    layer: _Layer, b: int, score: Score, keys: Tensor, positions: Tensor, without: int = 0
) -> tuple[Tensor, Tensor]:
    """The queries that a score needs, `[H_kv, g, W, D]`, and their positions `[W]`; W is 0 where there are none."""
    history, heads, wanted = layer.kv.history, keys.shape[0], score.needs.queries
    if wanted != 0 and (history.segments if wanted is not None else history.uncounted(b)):
        return history.recall(b, heads, wanted, without)
    return keys.new_empty(heads, layer.plan.group, 0, keys.shape[-1]), positions.new_empty(0)


def _score_sequence(layer: _Layer, b: int) -> LayerScores | None:
    """Scores of one sequence with protected entries at +inf and dead ones at -inf; None if it keeps everything."""
    s, plan, tokens = layer.selection, layer.plan, layer.step.cache.seen[b]
    span = plan.span(tokens)
    if tokens == 0 or s.spares(span):
        return None
    (budget, floor), (sinks, recent) = s.resolve(span), s.always(span)
    seen = _observation(layer, b, s.score)
    among = candidates(seen.positions, tokens, span)
    raw, mass = s.score.score(seen).float(), None
    if s.uncertainty:
        queries, query_positions = _queries(layer, b, s.uncertainty, seen.keys, seen.positions)
        window_attention = _window_attention(layer, b, s.uncertainty, seen.keys.shape[1])
        seen = replace(seen, queries=queries, query_positions=query_positions, window_attention=window_attention)
        mass = s.uncertainty.score(seen).float()
        if s.demotes:
            mass = _received(layer, b, seen, mass)
            raw = mass if s.score == s.uncertainty else raw
    scores = protect(raw, seen.positions, among, tokens, sinks, recent)
    return LayerScores(scores, mass, among.sum(1), budget, floor, newest=tokens - 1)


def _received(layer: _Layer, b: int, seen: Observation, mean: Tensor) -> Tensor:
    """Let the layer count on from the `mean [H_kv, n]` attention of the queries that are `seen`; the mean of all.

    A pass of fewer queries than the score wants to see adds to what was counted before, any other begins anew.
    """
    store, s = tiered(layer.kv.held), layer.selection
    rows = range(b * store.heads, (b + 1) * store.heads)
    since = seen.positions.clamp(min=int(seen.query_positions[0])).float()
    sums = mean * (seen.tokens - since)
    before = [store.received(r) for r in rows]
    wanted = s.uncertainty.needs.queries if s.uncertainty else None
    counts = []
    for h, (known, n) in enumerate(zip(before, seen.lengths.tolist(), strict=True)):
        if known is not None and wanted is not None and seen.query_positions.numel() < wanted:
            sums[h, :n] += known.sums
            since[h, :n] = known.since
        always = seen.positions[h, :n] < s.sinks
        counts.append(Received(sums[h, :n].masked_fill(always, float("inf")), since[h, :n]))
    layer.kv.history.received[b] = counts
    return sums / (seen.tokens - since)


@dataclass(frozen=True)
class Chosen:
    """Entries that stay, by layer and row, ascending (layers that select nothing now are not there); the high ones."""

    entries: dict[int, list[Tensor]]
    high: dict[int, list[Tensor]]


def compress(step: Step, scores: dict[int, SequenceScores]) -> None:
    """Keep what the selection of these layers allows; layers given together share one budget."""
    keep(step, scores, choose(step, scores))


def choose(step: Step, scores: dict[int, SequenceScores]) -> Chosen:
    """What the selection of these layers allows; layers given together share one budget."""
    if all(of_layer is None for of_layer in scores.values()):
        return Chosen({}, {})
    indices: dict[int, list[Tensor]] = {i: [] for i in scores}
    high: dict[int, list[Tensor]] = {i: [] for i in scores}
    for b in range(len(step.cache.seen)):
        scored = {i: row for i, rows in scores.items() if rows is not None and (row := rows[b]) is not None}
        counts = _counts(step, scored, step.coming[b] if step.coming else 0)
        for i in scores:
            if i not in scored:
                indices[i] += _all(step.cache.layers[i], b, step.cache.seen[b])
                high[i] += indices[i][-step.cache.layers[i].held.heads :]
                continue
            indices[i] += highest(scored[i].scores, counts[i])
            tiers = _tiers(step, i)
            if tiers is not None:
                high[i] += highest(scored[i].scores, high_counts(tiers, scored[i], counts[i]))
    due = [i for i, of_layer in scores.items() if of_layer is not None]
    return Chosen({i: indices[i] for i in due}, high)


def keep(step: Step, layers: Iterable[int], chosen: Chosen) -> None:
    """Free what is not `chosen` of these layers; of the others what no later token can see."""
    for i in layers:
        if i in chosen.entries and _tiers(step, i) is not None:
            _divide(step, i, chosen.entries[i], chosen.high[i])
        elif i in chosen.entries:
            _keep(step, i, chosen.entries[i])
        elif not chosen.entries:
            trim(step.cache.layers[i], step, step.cache.plan.layers[i])
            demote(step.cache.layers[i], step)


def _tiers(step: Step, index: int) -> Tiers | None:
    selection = step.cache.plan.layers[index].selection
    return None if selection is None else selection.tiers


def _divide(step: Step, index: int, indices: list[Tensor], high: list[Tensor]) -> None:
    """Keep only the entries `indices[row]`, of which `high[row]` are held in high precision, if they still are."""
    kv: LayerCache = step.cache.layers[index]
    step.cache.evictions.events += 1
    dropped = sum(kv.held.lengths) - sum(i.numel() for i in indices)
    heads, longest = kv.held.heads, max(kv.held.lengths)
    low = [stay[~torch.isin(stay, best)] for stay, best in zip(indices, high, strict=True)]
    every = range(kv.held.batch)
    received = [row for b in every for row in kv.history.received.get(b, [None] * heads)]
    kv.history.received = {}
    with kv.at_hand() as store:
        kv.changed()
        tiered(store).divide(high, low, received, step.cache.headroom, kv.compactor)
    step.cache.encoded()
    if dropped:
        step.cache.evicted(index, dropped)
        kv.history.keep(indices, heads, longest)


def demote(kv: LayerCache, step: Step) -> None:
    """After a decoded token: it enters the high tier of each row, and the weakest entry leaves it where it is too weak.

    See `kvcompile.kernels.demote`. All rows go together; what they hold is counted on from the attention that the
    kernel of this pass has added up, mean over the query heads of a KV head.
    """
    s, sums = kv.plan.selection, kv.history.column_sums
    if step.prefill or s is None or s.tiers is None or s.tiers.alpha is None or s.tiers.prune is None or sums is None:
        return
    kv.history.column_sums = None
    store, cache = tiered(kv.held), step.cache
    rule = _rule(step, s, s.tiers.alpha, s.tiers.prune, cache.kernels.group(kv.plan.index), store)
    cache.encoded()
    kv.changed()
    received = sums[:, :, : max(store.lengths)].flatten(0, 1).detach()
    dropped = store.demote(received, rule, cache.headroom, kv.compactor, cache.backend.demote)
    if dropped:
        cache.evicted(kv.plan.index, dropped)


def _rule(step: Step, s: Selection, alpha: float, prune: float, group: int, store: Store) -> Rule:
    """What is too weak at this step, said once for all layers that are alike."""
    recent, heads = int(s.recent), store.heads
    key = "demote", alpha, prune, recent, s.sinks, group, heads
    if key not in step.shared:
        seen = torch.tensor(step.cache.seen, device=store.device, dtype=torch.float32)
        tokens = seen.repeat_interleave(heads)
        step.shared[key] = Rule(tokens, alpha / tokens, prune / tokens, recent, s.sinks, group)
    rule: Rule = step.shared[key]
    return rule


def _counts(step: Step, scored: dict[int, LayerScores], coming: int) -> dict[int, Tensor]:
    """Tokens per head `[H_kv]` for each scored layer of one sequence, of whose prompt so many tokens are `coming`."""
    plan, counts, dynamic = step.cache.plan, {}, []
    for i, layer in scored.items():
        fixed = plan.kept(i, layer.newest + 1, coming)
        if fixed is None:
            dynamic.append(i)
        else:
            counts[i] = torch.tensor(fixed, device=layer.lengths.device, dtype=torch.int64).minimum(layer.lengths)
    selection = plan.layers[dynamic[0]].selection if dynamic else None
    if selection is not None:
        counts.update(zip(dynamic, split(selection.allocation, [scored[i] for i in dynamic]), strict=True))
    return counts


def _all(kv: LayerCache, b: int, tokens: int) -> list[Tensor]:
    """Indices of everything that the layer can still see after `tokens` of the sequence."""
    rows = kv.held.rows()[b * kv.held.heads : (b + 1) * kv.held.heads]
    return [(positions >= tokens - kv.plan.span(tokens)).nonzero().squeeze(-1) for _, _, positions in rows]


def _keep(step: Step, index: int, indices: list[Tensor]) -> None:
    kv: LayerCache = step.cache.layers[index]
    step.cache.evictions.events += 1
    if _drop(step, kv, indices) and kv.plan.selection is not None and kv.plan.selection.positions == "compact":
        _close_ranks(step, index, kv, indices)


def _drop(step: Step, kv: LayerCache, indices: list[Tensor]) -> bool:
    """Keep only these entries of the layer, and what is carried for them; whether anything was dropped."""
    dropped = sum(kv.held.lengths) - sum(i.numel() for i in indices)
    if not dropped:
        return False
    heads, longest = kv.held.heads, max(kv.held.lengths)
    kv.keep(indices, step.cache.headroom)
    step.cache.evicted(kv.plan.index, dropped)
    kv.history.keep(indices, heads, longest)
    return True


def trim(kv: LayerCache, step: Step, plan: LayerPlan) -> None:
    """Free the entries of a sliding layer that no later token can see; in a prefill a selection does that itself."""
    if plan.sliding_window is None or not step.due(TRIM_EVERY) or (step.prefill and plan.selection is not None):
        return
    _drop(step, kv, [i for b in range(kv.held.batch) for i in _all(kv, b, step.cache.seen[b])])


__all__ = ["SequenceScores", "choose", "compress", "keep", "observation", "observe", "score_remembered", "trim"]
