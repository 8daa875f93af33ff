"""A layer's store at work: tokens come, are dropped and encoded in random order, with any compactor."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from kvcompile.plan.plan import LayerPlan
from kvcompile.plan.storage import Codec, Storage
from kvcompile.plan.structure import Latent
from kvcompile.runtime.layer import LayerCache

HEADS, DIM, HEADROOM = 2, 8, 8
INT4 = Codec("int4", "channel", 4), Codec("int4", "token", 4)
STORAGES = {
    "plain": Storage(),
    "paged": Storage(page=4),
    "channel": Storage(*INT4, residual=4),
    "token": Storage(Codec("int8", "token"), Codec("float8", "token"), residual=3),
    "paged channel": Storage(*INT4, residual=4, page=8),
    "paged token": Storage(Codec("int2", "token"), Codec("int8", "token"), residual=3, page=4),
}


def plan_of(storage: Storage, latent: bool = False) -> LayerPlan:
    plan = LayerPlan(0, HEADS, HEADS, DIM, 0, 1.0, sliding_window=10**6, storage=storage)
    return replace(plan, latent=Latent(8, (0, 1), HEADS), kv_heads=1) if latent else plan


def worked(layer: LayerCache, seed: int, turns: int = 40) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The rows after tokens came, were dropped and were encoded in random order."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, seen = rng.randint(1, 3), 0
    heads, width = (1, layer.plan.key_dim) if layer.plan.latent else (HEADS, DIM)
    for turn in range(turns):
        op = "append" if turn == 0 else rng.choice(["append", "step", "step", "flush", "keep", "keep"])
        if op in ("append", "step"):
            count = 1 if op == "step" else rng.randint(8, 30)
            keys, values = torch.randn(2, batch, heads, count, width, generator=g)
            valid = torch.ones(batch, count, dtype=torch.bool)
            if seed % 2 and op == "append":
                valid[0, : rng.randint(0, count)] = False
            at = seen + valid.long().cumsum(1) - 1
            seen += count
            layer.append(keys, values, at, None if valid.all() else valid, HEADROOM)
        elif op == "keep":
            lengths = layer.held.lengths
            same = len(set(lengths)) == 1 and rng.random() < 0.5
            share = rng.random()
            counts = [max(1, int(n * (share if same else rng.random()))) for n in lengths]
            layer.keep(
                [torch.randperm(n, generator=g)[:k].sort().values for n, k in zip(lengths, counts, strict=True)],
                HEADROOM,
            )
        else:
            layer.flush(HEADROOM, rng.random() < 0.5)
    rows: list[tuple[Tensor, Tensor, Tensor]] = layer.held.rows()
    return rows
