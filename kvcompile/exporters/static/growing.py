"""A plain cache that is handed in and out, longer by the new tokens: the form that ONNX runtimes step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.exporters.static.attention import masked
from kvcompile.exporters.static.lower import lowered
from kvcompile.plan.plan import LayerPlan, Plan


@dataclass(frozen=True)
class Rows:
    """All keys and values `[B, H_kv, past + Q, D]` of one layer."""

    keys: Tensor
    values: Tensor


class GrowingCache:
    """Keys and values of the past `[B, H_kv, P, D]` and of `Q` new tokens; every layer keeps everything."""

    def __init__(self, plan: Plan, past: Sequence[Tensor], ids: Tensor) -> None:
        self.plan = plan
        owners = [p.index for p in plan.owners]
        self.past = dict(zip(owners, zip(past[::2], past[1::2], strict=True), strict=True))
        self.present: dict[int, Rows] = {}
        past_tokens = past[0].shape[2]
        self.positions = torch.arange(past_tokens, past_tokens + ids.shape[1], device=ids.device, dtype=torch.int64)
        self.entries = torch.arange(past_tokens + ids.shape[1], device=ids.device, dtype=torch.int64)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Rows:
        """The past and the new tokens."""
        old_keys, old_values = self.past[layer]
        self.present[layer] = Rows(torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2))
        return self.present[layer]

    def attend(self, p: LayerPlan, queries: Tensor, kv: Rows) -> Tensor:
        """Causal attention, under the layer's window."""
        at = self.positions.unsqueeze(-1)
        visible = self.entries <= at
        if p.sliding_window:
            visible = visible & (self.entries > at - p.sliding_window)
        return masked(p, queries, kv.keys, kv.values, visible)

    def trim(self, kv: Rows) -> None:
        """Nothing: the caller holds the rows."""


class GrowingProgram(nn.Module):
    """`input_ids [B, Q], *past` to `(logits [B, Q, vocabulary], *present)`: keys, then values, of each owner layer.

    The prompt is the pass with `P = 0`. Positions count from the past's length, so sequences are not padded.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        compiled: Any = model.kvcompile
        self.traced = lowered(compiled.graph)
        self.plan: Plan = compiled.plan

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Logits of all new tokens, and the cache with them in it."""
        cache = GrowingCache(self.plan, past, input_ids)
        positions = cache.positions.expand(input_ids.shape[0], -1)
        logits = self.traced(input_ids, None, positions, cache, slice(None))
        rows = [cache.present[p.index] for p in self.plan.owners]
        return (logits, *(x for kv in rows for x in (kv.keys, kv.values)))
