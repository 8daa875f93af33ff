"""What the graph does at the end of a pass in which a selection is due, for one that had to wait for a replay."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from kvcompile.plan.plan import Plan
from kvcompile.runtime import eviction
from kvcompile.runtime.cache import KVCache, Step
from kvcompile.runtime.replay.refit import refit
from kvcompile.runtime.replay.replay import replay

if TYPE_CHECKING:
    from kvcompile.runtime.model import Compiled


def replay_and_select(compiled: Compiled, cache: KVCache) -> None:
    """Replay what the pass that has just ended withheld its selection for, then select, encode and park."""
    withheld, cache.withheld = cache.withheld, None
    if withheld is None:
        return
    concerned = [True] * len(cache.seen)
    if withheld.prefill:
        waiting = [cache.layers[p.index].history.waiting for p in cache.plan.selected]
        concerned = waiting[0] or concerned
        for p in cache.plan.selected:
            cache.layers[p.index].history.waiting = None
    if cache.replayed is not None and cache.replayed.replay is not None and cache.replayed.replay.scores:
        replay(compiled, cache, concerned)
    select(replace(withheld, withheld=False), cache.plan, concerned, compiled)


@torch.no_grad()
def select(step: Step, plan: Plan, concerned: list[bool] | None = None, compiled: Compiled | None = None) -> None:
    """Drop what no selection keeps, then group, encode and park what stays.

    Args:
        step: a pass that has ended, at the end of which selections are due.
        plan: that of the cache, with the scores that are to be asked.
        concerned: sequences that are scored (None: all).
        compiled: the model, for selections that give what stays other values (None: there is none).
    """
    cache, scores = step.cache, {}
    for p in plan.selected:
        layer = cache.layers[p.index]
        with layer.at_hand():
            scores[p.index] = eviction.score_remembered(layer, step, p, concerned)
        if step.last and step.prefill and not (p.selection and p.selection.schedule.decode_every):
            layer.history.forget()
    chosen = [(group, eviction.choose(step, {i: scores[i] for i in group})) for group in cache.plan.budgets]
    if compiled is not None:
        refit(compiled, cache, {i: rows for _, each in chosen for i, rows in each.entries.items()})
    for group, each in chosen:
        eviction.keep(step, group, each)
    for p in cache.plan.owners:
        layer = cache.layers[p.index]
        if p.selection is None:
            eviction.trim(layer, step, p)
        layer.group_new(step)
        if (step.prefill or p.selection is not None) and layer.flush(cache.headroom, step.prefill, step.concerned):
            cache.encoded()
        layer.to_host()
