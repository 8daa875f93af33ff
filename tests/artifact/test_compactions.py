"""Stores move what they keep by their compactor, by nothing that their plan does not foretell, and rightly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from working import STORAGES, plan_of, worked

from kvcompile.artifact.compactions import expected
from kvcompile.kernels.compact import Arrays, Compactor, CompactSpec, compact, spec_of
from kvcompile.kernels.cpp import build
from kvcompile.kernels.cpp import compact as generated
from kvcompile.kernels.dispatch import CPP, REFERENCE, SDPA
from kvcompile.plan.plan import Plan
from kvcompile.plan.storage import Storage
from kvcompile.runtime.cache import KVCache
from kvcompile.runtime.layer import LayerCache

stored = pytest.mark.parametrize("storage", STORAGES.values(), ids=list(STORAGES))


class Recorder:
    """A compactor that remembers which kernels would have run."""

    def __init__(self, compactor: Compactor = compact) -> None:
        self.compactor, self.specs = compactor, set[CompactSpec]()

    def __call__(
        self, source: Arrays, target: Arrays, kept: Tensor, counts: list[int], first: list[int] | None = None
    ) -> None:
        if kept.numel():
            self.specs.add(spec_of(source, target))
        self.compactor(source, target, kept, counts, first)


@stored
def test_nothing_runs_that_the_plan_does_not_foretell(storage: Storage) -> None:
    """What is foretold is what an artifact shows; all of it happens."""
    recorder = Recorder()
    for seed in range(12):
        worked(LayerCache(plan_of(storage), compactor=recorder), seed)
    assert recorder.specs == set(expected(plan_of(storage), "float32"))


def test_latents_move_without_values() -> None:
    recorder, plan = Recorder(), plan_of(Storage(), latent=True)
    for seed in range(6):
        worked(LayerCache(plan, compactor=recorder), seed)
    assert recorder.specs == set(expected(plan, "float32"))
    assert all(len(spec.entries) == 2 for spec in recorder.specs)


def test_a_layer_that_drops_nothing_moves_nothing() -> None:
    plan = replace(plan_of(Storage()), sliding_window=None)
    assert expected(plan, "float32") == []


@pytest.mark.skipif(build.available() is not None, reason="no C++ compiler here")
@stored
def test_the_kernel_leaves_the_bytes_that_torch_leaves(storage: Storage) -> None:
    for seed in range(4):
        mine = worked(LayerCache(plan_of(storage), compactor=generated.compact), seed)
        theirs = worked(LayerCache(plan_of(storage)), seed)
        for a, b in zip(mine, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_layer_of_a_cache_gets_the_compactor_of_the_backend() -> None:
    plan = Plan("tiny", "float32", (plan_of(Storage()),))
    for backend, compactor in ((SDPA, compact), (REFERENCE, compact), (CPP, generated.compact)):
        assert KVCache(plan, backend=backend).layers[0].compactor is compactor
