"""Layers in every layout, some of their entries, and attention to copies of these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels import reference
from kvcompile.kernels.dispatch import named
from kvcompile.kernels.layout import DenseView, Queries
from kvcompile.kernels.spec import KernelSpec, plain
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.storage import Codec, Storage
from kvcompile.runtime.cache import KVCache, Step
from kvcompile.runtime.layer import LayerCache

BATCH, HEADS, GROUP, DIM = 2, 2, 3, 16
TOKEN = (Codec("int8", "token"), Codec("int4", "token", 8))
CHANNEL = (Codec("int4", "channel", 8), Codec("int8", "token"))
STORES = {
    "dense": Storage(),
    "ragged": Storage(),
    "paged": Storage(page=8),
    "token": Storage(*TOKEN, residual=7),
    "channel": Storage(*CHANNEL, residual=7),
    "token paged": Storage(*TOKEN, residual=7, page=8),
    "channel paged": Storage(*CHANNEL, residual=7, page=16),
}


def within(name: str) -> float:
    """How near a backend comes to the reference: the C++ kernel meets integer codes with rounded queries."""
    return 2e-4 if STORES[name].quantized else 2e-6


def filled(name: str, backend: str, new: int) -> tuple[LayerCache, Step, Tensor]:
    """A layer that holds a prompt of 50 and `new` tokens, whose queries come too; only dense rows have one length."""
    torch.manual_seed(0)
    shape: Any = (HEADS * GROUP, HEADS, DIM)
    plan = LayerPlan(0, *shape, 0, DIM**-0.5, storage=STORES[name])
    cache = KVCache(Plan("llama", "float32", (plan,)), backend=named(backend))
    layer: LayerCache = cache.layers[0]
    valid = torch.ones(BATCH, 50, dtype=torch.bool)
    valid[1, :5] = name == "dense"  # padding
    for count, real in ((50, valid), (new, torch.ones(BATCH, new, dtype=torch.bool))):
        mask = None if bool(real.all()) else torch.cat((torch.ones(BATCH, cache.get_seq_length()), real), 1)
        step = cache.begin(torch.zeros(BATCH, count, dtype=torch.long), mask)
        layer.append(*torch.randn(2, BATCH, HEADS, count, DIM), step.positions, step.valid, 8)
        if count == 50:
            layer.flush(8, True)
    if name != "dense":
        lengths = layer.held.lengths
        layer.keep([torch.cat((torch.arange(24), torch.arange(24 + r, n))) for r, n in enumerate(lengths)], 8)
        assert len(set(layer.held.lengths)) > 1
    return layer, step, torch.randn(BATCH, HEADS * GROUP, new, DIM)


def choice(layer: LayerCache, new: int) -> list[Tensor]:
    """Some entries of each row, more from row to row: of encoded ones whole blocks of eight; and the new tokens'."""
    chosen = []
    for r, n in enumerate(layer.held.lengths):
        blocks = torch.arange(n) // 8
        old = torch.arange(n) < n - new
        chosen.append(torch.where((blocks % 3 == r % 2) & old | ~old)[0])
    return chosen


def gathered(layer: LayerCache, step: Step, queries: Tensor, chosen: list[Tensor]) -> Tensor:
    """The float64 reference over copies of the chosen entries, row by row."""
    p = layer.plan
    spec = KernelSpec(plain("dense", "float32"), 1, p.head_dim, p.head_dim, p.scale)
    out = torch.empty_like(queries)
    for r, ((keys, values, positions), at) in enumerate(zip(layer.held.rows(), chosen, strict=True)):
        b, h = divmod(r, HEADS)
        view = DenseView(keys[None, None, at], values[None, None, at], positions[None, None, at])
        for q in range(h * GROUP, (h + 1) * GROUP):
            asked = Queries(queries[b : b + 1, q : q + 1], step.positions[b : b + 1])
            out[b, q] = reference.attend(asked, view, spec)[0, 0]
    return out
