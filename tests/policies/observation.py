"""Observations made by hand, and the slowest possible attention to compare with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvcompile.runtime.observation import Observation


def observation(
    entries: int = 37,
    heads: int = 2,
    group: int = 3,
    dim: int = 8,
    window: int = 5,
    lengths: list[int] | None = None,
    seed: int = 0,
    **given: Any,
) -> Observation:
    """`window` newest queries over `entries` entries; where `lengths` are shorter, rows have holes and a dead tail."""
    generator = torch.Generator().manual_seed(seed)
    lengths = lengths or [entries] * heads
    positions = torch.full((heads, max(lengths)), -1)
    for h, length in enumerate(lengths):
        if not length:
            continue
        kept = torch.randperm(entries - 1, generator=generator)[: length - 1].sort().values
        positions[h, :length] = torch.cat((kept, torch.tensor([entries - 1])))
    made: dict[str, Any] = {
        "queries": torch.randn(heads, group, window, dim, generator=generator),
        "query_positions": torch.arange(entries - window, entries),
        "keys": torch.randn(heads, max(lengths), dim, generator=generator),
        "values": torch.randn(heads, max(lengths), dim, generator=generator),
        "positions": positions,
        "lengths": torch.tensor(lengths),
        "tokens": entries,
        "scale": dim**-0.5,
    }
    return Observation(**{**made, **given})


def naive_attention(seen: Observation) -> Tensor:
    """`[H_kv, g, W, n]` in float64, one number at a time."""
    heads, group, window, _ = seen.queries.shape
    out = torch.zeros(heads, group, window, seen.keys.shape[1], dtype=torch.float64)
    for h in range(heads):
        for g in range(group):
            for i in range(window):
                asked, weights = int(seen.query_positions[i]), {}
                for j, at in enumerate(seen.positions[h].tolist()):
                    if at < 0 or at > asked or (seen.sliding_window and at <= asked - seen.sliding_window):
                        continue
                    logit = float(seen.queries[h, g, i].double() @ seen.keys[h, j].double()) * seen.scale
                    weights[j] = math.exp(seen.softcap * math.tanh(logit / seen.softcap) if seen.softcap else logit)
                for j, weight in weights.items():
                    out[h, g, i, j] = weight / sum(weights.values())
    return out


def same(scores: Tensor, expected: Tensor, seen: Observation) -> None:
    """Scores equal the expected ones on all entries that are really there."""
    torch.testing.assert_close(
        scores.double()[seen.positions >= 0], expected.double()[seen.positions >= 0], rtol=1e-4, atol=1e-6
    )
