"""The proof that a plan ran: what each layer of the live cache holds, beside what the plan says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompile.errors import BUG, KvcompileError
from kvcompile.evaluation import proof
from kvcompile.plan.plan import Plan
from kvcompile.runtime.cache import KVCache


@dataclass(frozen=True)
class LayerRow:
    """One layer after the measured prompt: tokens kept by each KV head, bytes held, and what the plan said.

    planned: tokens per head, None where the split over heads or layers depends on the input; planned_bytes: what the
    planned (else the kept) tokens take.
    dense_bytes: what the uncompressed layer would hold. threshold: no budget, the scores alone decide.
    host_bytes: of `bytes`, what was found in host memory; offloaded: the plan says that all of it lies there.
    owner: the layer whose cache it reads, None where it has its own.
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
        _equal(f"{where} must hold the planned bytes", row.bytes, row.planned_bytes)
        away = row.bytes if row.offloaded else 0
        _equal(f"{where} must hold in host memory the bytes that are offloaded", row.host_bytes, away)
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


def prove(model: Any, ids: Tensor) -> tuple[list[LayerRow], int | None]:
    """What each layer of the live cache holds after the prompt `ids [1, n]`, beside what the plan says.

    Raises KvcompileError where they differ, or where nothing was dropped though the plan drops.
    """
    plan: Plan = model.kvcompile.plan
    with torch.no_grad():
        cache: KVCache = model(ids.to(model.device), logits_to_keep=1).past_key_values
    tokens = ids.shape[1]
    planned = plan.bytes(1, tokens)
    rows = []
    for expected, layer, p in zip(planned, cache.layers, plan.layers, strict=True):
        lengths = layer.store.lengths if layer.store is not None else [0] * p.kv_heads
        measured = layer.store.nbytes() if layer.store is not None else 0
        rows.append(
            LayerRow(
                layer=p.index,
                kv_heads=p.kv_heads,
                kept=list(lengths),
                planned=None if expected.kept is None else list(expected.kept),
                bytes=measured,
                planned_bytes=expected.bytes
                if expected.kept is not None
                else sum(p.nbytes(n, plan.dtype) for n in lengths),
                dense_bytes=expected.dense_bytes,
                threshold=p.selection is not None and p.selection.budget is None,
                host_bytes=layer.host_bytes_held(),
                offloaded=p.storage.offload,
                owner=None if p.owner == p.index else p.owner,
            )
        )
    free = [e.kept_total for e, row in zip(planned, rows, strict=True) if row.planned is None and not row.threshold]
    total = sum(free) if free else None
    proof.verify(rows, total)
    if plan.selected and not cache.evictions.events and cache.nbytes() >= sum(r.dense_bytes for r in rows):
        wanted = sum(e.bytes for e in planned)
        if wanted < sum(r.dense_bytes for r in rows):
            raise KvcompileError("the measured prompt must be compressed", f"no eviction after {tokens} tokens", BUG)
    return rows, total
