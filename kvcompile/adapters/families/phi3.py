"""One projection, all query heads, then all key heads, then all value heads: phi3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture, one_window
from kvcompile.adapters.base import Attention
from kvcompile.adapters.families.llama import Clips
from kvcompile.adapters.layout import Layout, Projection, Weights, linear_of, plain

NAME = "qkv_proj"


@dataclass(frozen=True)
class FusedLayout(Layout):
    """Rows of all query heads, all key heads, all value heads."""

    def read(self) -> Weights:
        """As views."""
        rows = self.rows(NAME, self.heads + 2 * self.kv_heads)
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        weights = torch.split(rows.weight, sizes)
        biases: Sequence[Tensor | None] = [None] * 3 if rows.bias is None else torch.split(rows.bias, sizes)
        query, key, value = (Projection(w, b) for w, b in zip(weights, biases, strict=True))
        return Weights(query, key, value, self.output())

    def write(self, new: Weights) -> dict[str, nn.Module]:
        """One new projection; of queries alone where the layer reads another layer's cache."""
        parts = [part for part in (new.query, new.key, new.value) if part is not None]
        return {**self.write_output(new), NAME: linear_of(plain(self.attention, NAME), parts)}


class Fused(Attention):
    """One projection of all there is."""

    layout: ClassVar[type[Layout] | None] = FusedLayout
    keeps: ClassVar[tuple[str, ...]] = ("o_proj", NAME)
    qkv_proj: nn.Module

    def projected(self, states: Tensor) -> Tensor:
        """What the one projection gives."""
        rows: Tensor = self.qkv_proj(states)
        return rows

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """`[B, Q, (g + 2) * H_kv * D]` cut into g + 2 equal parts: g of queries, one of keys, one of values."""
        if self.reads:  # only the rows of the queries are left, and only the queries will be used
            queries = self.heads(self.projected(states))
            return queries, queries, queries
        parts = torch.unflatten(self.projected(states), -1, (self.group + 2, -1))
        queries, keys, values = torch.split(parts, [self.group, 1, 1], 2)
        return self.heads(queries.flatten(2)), self.heads(keys.flatten(2)), self.heads(values.flatten(2))


class Dbrx(Clips, Fused):
    """The same, clipped, called `Wqkv` and `out_proj`: dbrx."""

    layout = None
    keeps: ClassVar[tuple[str, ...]] = ("Wqkv", "out_proj")
    out: ClassVar[str] = "out_proj"
    Wqkv: nn.Module

    def projected(self, states: Tensor) -> Tensor:
        """Within the config's `clip_qkv`."""
        return self.clip(self.Wqkv(states))


def dbrx_heads(config: Any, layer: int) -> tuple[int, int]:
    """KV heads stand in a config of the attention alone."""
    return int(config.n_heads), int(config.attn_config.kv_n_heads)


PHI3 = Architecture(Fused, window=one_window)
DBRX = Architecture(
    Dbrx,
    attention="norm_attn_norm.attn",
    layers="blocks",
    heads=dbrx_heads,
    head_dim=lambda config, layer: int(config.d_model // config.n_heads),
    scale=lambda config: float((config.d_model // config.n_heads) ** -0.5),
    grouped=False,
)
