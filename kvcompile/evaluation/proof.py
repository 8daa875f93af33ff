"""The proof that a plan ran: what each layer of the live cache holds and reads, beside what the plan says."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvcompile.errors import BUG, KvcompileError
from kvcompile.evaluation import proof
from kvcompile.evaluation.recall import metered
from kvcompile.plan.plan import LayerBytes, Plan
from kvcompile.runtime.cache import KVCache
from kvcompile.stores import factory

RECALL_STEPS = 8  # of decoding, over which cluster recall is measured


@dataclass(frozen=True)
class LayerRow:
    """One layer after the measured prompt: tokens kept by each KV head, bytes held and read, and what the plan said.

    planned: tokens per head, None where the split over heads or layers depends on the input; planned_bytes: what the
    planned (else the kept) tokens take.
    dense_bytes: what the uncompressed layer would hold. threshold: no budget, the scores alone decide.
    host_bytes: of `bytes`, what was found in host memory; offloaded: the plan says that all of it lies there.
    owner: the layer whose cache it reads, None where it has its own.
    index_bytes: of what stands for groups of tokens, on the device beside `bytes`. read: what the next decode step
    read, index included; dense_read: what it would of the uncompressed layer. recalls: each step chooses what it reads.
    low: of the tokens kept by each KV head, those in the low tier; planned_low: as the plan says, None where the input
    decides. cluster_recall: of the tokens that its queries score highest, the share that the next steps read; None
    where they had no choice.
    """

    layer: int
    kv_heads: int
    kept: list[int]
    planned: list[int] | None
    bytes: int
    planned_bytes: int
    dense_bytes: int
    threshold: bool = False
    host_bytes: int = 0
    offloaded: bool = False
    owner: int | None = None
    index_bytes: int = 0
    planned_index: int = 0
    read: int = 0
    planned_read: int = 0
    dense_read: int = 0
    recalls: bool = False
    low: list[int] = field(default_factory=list)
    planned_low: list[int] | None = None
    cluster_recall: float | None = None


def verify(rows: Sequence[LayerRow], planned_total: int | None = None) -> None:
    """Compare live cache and plan. Raises KvcompileError naming the layer and head where they differ.

    planned_total: tokens that the layers without a plan of their own must hold together, over all their heads;
    layers with a threshold are left out of that sum.
    """
    for row in rows:
        where = f"layer {row.layer}"
        _equal(f"{where} must hold its KV heads", len(row.kept), row.kv_heads)
        if row.planned is not None:
            _equal(f"{where} must have a plan for its KV heads", len(row.planned), row.kv_heads)
            for head, (kept, planned) in enumerate(zip(row.kept, row.planned, strict=True)):
                _equal(f"{where}, head {head} must hold the planned tokens", kept, planned)
        for head, (low, planned) in enumerate(zip(row.low, row.planned_low or row.low, strict=True)):
            _equal(f"{where}, head {head} must hold the planned tokens in the low tier", low, planned)
        _equal(f"{where} must hold the planned bytes", row.bytes, row.planned_bytes)
        away = row.bytes if row.offloaded else 0
        _equal(f"{where} must hold in host memory the bytes that are offloaded", row.host_bytes, away)
        _equal(f"{where} must hold the planned bytes of its index", row.index_bytes, row.planned_index)
        _equal(f"a decode step must read the planned bytes of {where}", row.read, row.planned_read)
        if row.bytes > row.dense_bytes:
            raise KvcompileError(
                f"{where} must not hold more than uncompressed", f"{row.bytes} > {row.dense_bytes} bytes"
            )
    if planned_total is not None:
        free = [row for row in rows if row.planned is None and not row.threshold]
        names = ", ".join(str(row.layer) for row in free)
        _equal(f"layers {names} together must hold the planned tokens", sum(sum(r.kept) for r in free), planned_total)


def _equal(rule: str, measured: int, planned: int) -> None:
    if measured != planned:
        got = f"{measured} where {planned} was planned"
        raise KvcompileError(f"measured cache and plan disagree: {rule}", got, BUG)


@dataclass(frozen=True)
class Held:
    """What one layer of a live cache holds: tokens by KV head, bytes, those in host memory, bytes of its index; of the
    tokens, those in the low tier.
    """

    kept: list[int]
    bytes: int
    host: int
    index: int
    low: list[int]


def prove(model: Any, ids: Tensor) -> tuple[list[LayerRow], int | None]:
    """What each layer of the live cache holds after the prompt `ids [1, n]`, and what a decode step then reads of it.

    Raises KvcompileError where that is not what the plan says, or where nothing was dropped though the plan drops.
    """
    plan: Plan = model.kvcompile.plan
    ids, tokens = ids.to(model.device), ids.shape[1]
    with torch.no_grad():
        cache: KVCache = model(ids, logits_to_keep=1).past_key_values
        evicted, held = cache.evictions.events > 0, [_held(cache, p.index) for p in plan.layers]
        cache.reads = {}
        for _ in range(plan.steps):
            logits = model(ids[:, -1:], past_key_values=cache, logits_to_keep=1).logits
        reads, cache.reads = {layer: total // plan.steps for layer, total in cache.reads.items()}, None
        recalls = _cluster_recall(model, cache, logits.argmax(-1)) if any(p.recall for p in plan.layers) else {}
    planned = plan.bytes(1, tokens)
    rows = [_row(plan, tokens, expected, held, reads.get(expected.index, 0)) for expected in planned]
    rows = [replace(row, cluster_recall=recalls.get(row.layer)) for row in rows]
    free = [e.kept_total for e, row in zip(planned, rows, strict=True) if row.planned is None and not row.threshold]
    total = sum(free) if free else None
    proof.verify(rows, total)
    dense = sum(r.dense_bytes for r in rows)
    if plan.selected and not evicted and sum(r.bytes for r in rows) >= dense > sum(e.bytes for e in planned):
        raise KvcompileError("the measured prompt must be compressed", f"no eviction after {tokens} tokens", BUG)
    return rows, total


def _cluster_recall(model: Any, cache: KVCache, token: Tensor) -> dict[int, float]:
    """Mean cluster recall of each layer that has a choice, over steps that go on greedily after `token [1, 1]`."""
    with metered(model) as recalls:
        for _ in range(RECALL_STEPS):
            token = model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    return {layer: statistics.fmean(numbers) for layer, numbers in recalls.items()}


def _held(cache: KVCache, index: int) -> Held:
    layer = cache.layers[index]
    if layer.store is None:
        none = [0] * cache.plan.layers[index].kv_heads
        return Held(none, 0, 0, 0, none)
    groups = layer.index.nbytes() if layer.index is not None else 0
    return Held(
        list(layer.store.lengths), layer.store.nbytes(), layer.host_bytes_held(), groups, factory.low(layer.store)
    )


def _row(plan: Plan, tokens: int, expected: LayerBytes, held: list[Held], read: int) -> LayerRow:
    """Layer and plan side by side; where a split is known at run time alone, the plan of the tokens that were kept."""
    p = plan.layers[expected.index]
    owner, layer = plan.layers[p.owner], held[p.index]
    planned = expected.bytes, expected.index_bytes, expected.read
    if plan.kept(owner.index, tokens) is None or expected.low is None:
        index, reading = plan.reading(owner, held[owner.index].kept, tokens // plan.steps, held[owner.index].low)
        reading //= plan.steps
        nbytes = sum(p.nbytes(n, plan.dtype, low) for n, low in zip(layer.kept, layer.low, strict=True))
        planned = nbytes, index if owner is p else 0, reading
    return LayerRow(
        layer=p.index,
        kv_heads=p.kv_heads,
        kept=layer.kept,
        planned=None if expected.kept is None else list(expected.kept),
        bytes=layer.bytes,
        planned_bytes=planned[0],
        dense_bytes=expected.dense_bytes,
        threshold=p.selection is not None and p.selection.budget is None,
        host_bytes=layer.host,
        offloaded=p.storage.offload,
        owner=None if owner is p else p.owner,
        index_bytes=layer.index,
        planned_index=planned[1],
        read=read,
        planned_read=planned[2],
        dense_read=expected.dense_read,
        recalls=owner.recall is not None,
        low=layer.low,
        planned_low=None if expected.low is None else list(expected.low),
    )
