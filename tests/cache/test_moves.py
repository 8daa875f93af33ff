"""Stores move what they keep by the mover they are given, by nothing that their plan does not foretell, and rightly."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvcompile.cache import KVCache
from kvcompile.cache.layer import LayerCache
from kvcompile.cache.moves import expected
from kvcompile.kernels.compact import Arrays, CompactSpec, Mover, compact, spec_of
from kvcompile.kernels.cpp import build
from kvcompile.kernels.cpp import compact as generated
from kvcompile.plan import LayerPlan, Plan
from kvcompile.storage import Codec, Storage
from kvcompile.structure.data import Latent

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
stored = pytest.mark.parametrize("storage", STORAGES.values(), ids=list(STORAGES))


class Recorder:
    """A mover that remembers which kernels would have run, and how many bytes moved."""

    def __init__(self, mover: Mover = compact) -> None:
        self.mover, self.specs = mover, set[CompactSpec]()

    def __call__(
        self, source: Arrays, target: Arrays, kept: Tensor, counts: list[int], first: list[int] | None = None
    ) -> None:
        if kept.numel():
            self.specs.add(spec_of(source, target))
        self.mover(source, target, kept, counts, first)


def plan_of(storage: Storage, latent: bool = False) -> LayerPlan:
    plan = LayerPlan(0, HEADS, HEADS, DIM, 0, 1.0, sliding_window=10**6, storage=storage)
    return replace(plan, latent=Latent(8, (0, 1), HEADS), kv_heads=1) if latent else plan


def worked(layer: LayerCache, seed: int, turns: int = 40) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The rows after tokens came, were dropped and were encoded in random order."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, seen = rng.randint(1, 3), 0
    heads, width = (1, layer.plan.key_dim) if layer.plan.latent else (HEADS, DIM)
    for turn in range(turns):
        op = "append" if turn == 0 else rng.choice(["append", "step", "step", "settle", "keep", "keep"])
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
            layer.settle(HEADROOM, rng.random() < 0.5)
    rows: list[tuple[Tensor, Tensor, Tensor]] = layer.held.rows()
    return rows


@stored
def test_nothing_runs_that_the_plan_does_not_foretell(storage: Storage) -> None:
    """What is foretold is what an artifact shows; all of it happens."""
    recorder = Recorder()
    for seed in range(12):
        worked(LayerCache(plan_of(storage), mover=recorder), seed)
    assert recorder.specs == set(expected(plan_of(storage), "float32"))


def test_latents_move_without_values() -> None:
    recorder, plan = Recorder(), plan_of(Storage(), latent=True)
    for seed in range(6):
        worked(LayerCache(plan, mover=recorder), seed)
    assert recorder.specs == set(expected(plan, "float32"))
    assert all(len(spec.entries) == 2 for spec in recorder.specs)


def test_a_layer_that_drops_nothing_moves_nothing() -> None:
    plan = replace(plan_of(Storage()), sliding_window=None)
    assert expected(plan, "float32") == []


@pytest.mark.skipif(build.available() is not None, reason="no C++ compiler here")
@stored
def test_the_kernel_leaves_the_bytes_that_torch_leaves(storage: Storage) -> None:
    for seed in range(4):
        mine = worked(LayerCache(plan_of(storage), mover=generated.compact), seed)
        theirs = worked(LayerCache(plan_of(storage)), seed)
        for a, b in zip(mine, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_layer_of_a_cache_gets_the_mover_of_the_route() -> None:
    plan = Plan("tiny", "float32", (plan_of(Storage()),))
    for route, mover in (("sdpa", compact), ("reference", compact), ("cpp", generated.compact)):
        assert KVCache(plan, route=route).layers[0].mover is mover
