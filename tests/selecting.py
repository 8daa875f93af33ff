"""What the tests of selections share: scores that are easy to predict, tiny models that select, naive oracles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tiny import tiny_ids, tiny_model
from torch import Tensor

from kvcompile.adapters.architectures import describe
from kvcompile.compiler import compile_plan
from kvcompile.plan.selection import Allocation, Budget, LayerScores, Needs, Score, Selection, Traits
from kvcompile.runtime.cache import KVCache
from kvcompile.runtime.observation import Observation

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}


@dataclass(frozen=True)
class Hashed(Score):
    """A fixed pseudo-random number for each true position, layer and head: easy to predict, blind to the model."""

    def score(self, seen: Observation) -> Tensor:
        heads = torch.arange(seen.keys.shape[0]).unsqueeze(1)
        return hashed(seen.positions.long(), seen.layer, heads)


def hashed(position: Tensor, layer: int, head: Tensor) -> Tensor:
    return ((position + 3) * (7919 + 101 * head + 31 * layer) % 1009).float()


@dataclass(frozen=True)
class AllAttention(Score):
    """Attention of every query so far, summed (as h2o): carries state, needs every query once."""

    needs = Needs(queries=None, carries=True)

    def observe(self, seen: Observation) -> Tensor:
        total = seen.carried.clone() if seen.carried is not None else torch.zeros(seen.keys.shape[:2])
        for _, attention in seen.attention_blocks():
            total += attention.sum((1, 2))
        return total

    def score(self, seen: Observation) -> Tensor:
        assert seen.carried is not None
        return seen.carried


@dataclass(frozen=True)
class Labelled(AllAttention):
    """Carries each entry's own position + 1, given when it was new: shows whether state follows its entry."""

    def observe(self, seen: Observation) -> Tensor:
        carried = seen.carried if seen.carried is not None else torch.zeros(seen.keys.shape[:2])
        return torch.where(carried == 0, seen.positions + 1, carried)

    def score(self, seen: Observation) -> Tensor:
        assert seen.carried is not None
        inside = torch.arange(seen.keys.shape[1]) < seen.lengths.unsqueeze(1)
        assert torch.equal(seen.carried[inside], (seen.positions[inside] + 1).float())
        return Hashed().score(seen)


@dataclass(frozen=True)
class Expected(Score):
    """Logits of the mean query, rotated to the next positions."""

    stride: int = 1

    @property
    def needs(self) -> Needs:
        return Needs(moments=self.stride)

    def score(self, seen: Observation) -> Tensor:
        assert seen.moments is not None
        assert seen.mean_rotation is not None
        query = seen.moments.mean.mean(1) @ seen.mean_rotation(8)
        return (seen.keys.float() @ query.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class PerHead(Allocation):
    """One budget over all heads of a layer (or of all layers): the best entries anywhere stay."""

    across: bool = False

    @property
    def traits(self) -> Traits:
        return Traits("head", cross_layer=self.across)

    def allot(self, layers: Sequence[LayerScores]) -> list[Tensor]:
        total = sum(min(int(x.budget), int(n)) for x in layers for n in x.lengths)
        flat = torch.cat([x.scores.flatten() for x in layers])
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[flat.argsort(descending=True, stable=True)[:total]] = True
        parts = chosen.split([x.scores.numel() for x in layers])
        return [c.view_as(x.scores).sum(1) for c, x in zip(parts, layers, strict=True)]


@dataclass(frozen=True)
class Above(Allocation):
    """A threshold: every head keeps the entries that score more."""

    least: float

    traits = Traits(scope="head")

    def allot(self, layers: Sequence[LayerScores]) -> list[Tensor]:
        return [(x.scores > self.least).sum(1) for x in layers]


def selection(score: Score, budget: float | None = 0.4, **options: Any) -> Selection:
    settings: dict[str, Any] = {"sinks": 2, "recent": 3, **options}
    return Selection("test", score, None if budget is None else Budget(budget), **settings)


def compiled(
    s: Selection | None, name: str = "llama", chunk: int = 0, layers: Sequence[int] = range(4), **options: Any
) -> Any:
    model = tiny_model(name)
    plan = replace(describe(model.config), prefill_chunk=chunk).map(lambda p: replace(p, selection=s), layers)
    plan.check()
    return compile_plan(model, plan, **options)


def left_padded(tokens: int, *pads: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    ids, mask = tiny_ids(len(pads), tokens, seed), torch.ones(len(pads), tokens, dtype=torch.long)
    for b, n in enumerate(pads):
        ids[b, :n], mask[b, :n] = 0, 0
    return ids, mask


def prefill(model: Any, ids: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> KVCache:
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    assert bool(out.logits.isfinite().all())
    return out.past_key_values


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, new: int = 10, **options: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **{**GREEDY, **options})


def kept(cache: KVCache, layer: int) -> list[list[int]]:
    return [positions.tolist() for _, _, positions in cache.layers[layer].held.rows()]


def predicted(held: list[int], tokens: int, budget: int, layer: int, head: int, sinks: int = 2, recent: int = 3):
    """The naive selection: protected entries, then the highest scores, the older first."""
    scores = {p: float(hashed(torch.tensor(p), layer, torch.tensor(head))) for p in held}
    for p in held:
        if p < sinks or p >= tokens - recent:
            scores[p] = float("inf")
    return sorted(sorted(held, key=lambda p: (-scores[p], p))[:budget])
