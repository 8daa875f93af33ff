"""One projection, per KV head its queries, its key and its value: gpt_neox, where each head has one query."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture, by_head_dim
from kvcompile.adapters.base import Attention
from kvcompile.adapters.layout import Layout, Projection, Weights, linear_of, plain

NAME = "query_key_value"


@dataclass(frozen=True)
class InterleavedLayout(Layout):
    """Rows of each KV head: its queries, its key, its value."""

    def read(self) -> Weights:
        """As views of the cut rows."""
        group, hidden = self.heads // self.kv_heads, plain(self.attention, NAME).weight.shape[1]
        rows = self.rows(NAME, self.kv_heads)  # [H_kv, (g + 2) D, hidden]

        def cut(x: Tensor | None, at: slice, *shape: int) -> Tensor | None:
            return None if x is None else torch.unflatten(x, 1, (group + 2, self.dim))[:, at].reshape(shape)

        places = (
            (slice(0, group), self.heads),
            (slice(group, group + 1), self.kv_heads),
            (slice(group + 1, None), self.kv_heads),
        )
        parts = []
        for at, heads in places:
            weight = cut(rows.weight, at, heads, self.dim, hidden)
            if weight is not None:
                parts.append(Projection(weight, cut(rows.bias, at, heads, self.dim)))
        return Weights(parts[0], parts[1], parts[2], self.output())

    def write(self, new: Weights) -> dict[str, nn.Module]:
        """One new projection; of queries alone where the layer reads another layer's cache."""
        modules = self.write_output(new)
        old = plain(self.attention, NAME)
        if new.key is None or new.value is None:
            return {**modules, NAME: linear_of(old, [new.query])}
        kv_heads = new.key.weight.shape[0]

        def woven(*parts: Tensor) -> Tensor:
            return torch.cat([torch.unflatten(x, 0, (kv_heads, -1)).flatten(1, 2) for x in parts], 1)

        weight = woven(new.query.weight, new.key.weight, new.value.weight)
        bias = None
        if new.query.bias is not None and new.key.bias is not None and new.value.bias is not None:
            bias = woven(new.query.bias, new.key.bias, new.value.bias)
        return {**modules, NAME: linear_of(old, [Projection(weight, bias)])}


class Interleaved(Attention):
    """One projection of all there is, and an output called `dense`."""

    layout: ClassVar[type[Layout] | None] = InterleavedLayout
    keeps: ClassVar[tuple[str, ...]] = (NAME, "dense")
    out: ClassVar[str] = "dense"
    query_key_value: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """`[B, Q, H_kv * (g + 2) * D]` to `[B, H_kv, Q, (g + 2) * D]`, cut into g queries, a key and a value."""
        if self.reads:  # only the rows of the queries are left, and only the queries will be used
            queries = self.heads(self.query_key_value(states))
            return queries, queries, queries
        dim, group = self.head_dim, self.group
        heads = torch.unflatten(self.query_key_value(states), -1, (-1, (group + 2) * dim)).transpose(1, 2)
        queries, keys, values = torch.split(heads, [group * dim, dim, dim], -1)
        if group > 1:
            queries = torch.unflatten(queries, -1, (group, dim)).transpose(2, 3).flatten(1, 2)
        return queries, keys, values

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the base; this family's layers call the cache `layer_past`."""
        cache = past_key_values if layer_past is None else layer_past
        return super().forward(hidden_states, position_embeddings, attention_mask, cache)


class Japanese(Interleaved):
    """The same, whose layers add a bias of the last attention behind it: gpt_neox_japanese."""

    layout = None
    optional: ClassVar[tuple[str, ...]] = ("attention_dropout", "dense_bias")

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any, Any]:  # type: ignore[override]
        """As the base, and the bias (None where the layer has none)."""
        states, weights = super().forward(*args, **kwargs)
        return states, weights, self.dense_bias if "dense_bias" in self._parameters else None


class Persimmon(Interleaved):
    """The same, queries and keys normed head by head where the config says so: persimmon."""

    layout = None
    norms: ClassVar[tuple[str, ...]] = ("q_layernorm", "k_layernorm")
    optional: ClassVar[tuple[str, ...]] = (*norms, "attention_dropout")

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """With the norms."""
        queries, keys, values = super().project(states)
        query_norm, key_norm = (getattr(self, name, None) for name in self.norms)
        if query_norm is None or key_norm is None:
            return queries, keys, values
        return query_norm(queries), key_norm(keys), values


class Falcon(Interleaved):
    """The same with groups of queries, and rotary positions or logits that fall with distance: falcon."""

    layout = None
    optional: ClassVar[tuple[str, ...]] = ("attention_dropout",)

    def forward(self, *args: Any, alibi: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        """As the base; `alibi` is in the plan."""
        return super().forward(*args, **kwargs)


def falcon_heads(config: Any, layer: int) -> tuple[int, int]:
    """Query heads and KV heads of the three shapes that falcon has."""
    heads = int(config.num_attention_heads)
    if config.new_decoder_architecture:
        return heads, int(config.num_kv_heads)
    return heads, 1 if config.multi_query else heads


def bloom_slopes(config: Any) -> tuple[float, ...]:
    """2^(-8 i / c) of the largest power of two c that is no more than all heads, then every other one of 2 c."""
    heads = int(config.num_attention_heads)
    whole = 2 ** int(math.log2(heads))
    first = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
    return (*first, *(2 ** (-4 * i / whole) for i in range(1, 2 * (heads - whole), 2)))


def falcon_slopes(config: Any) -> tuple[float, ...]:
    """Bloom's, in bfloat16, scaled as logits are; none where the config has rotary positions."""
    if not config.alibi:
        return ()
    slopes = torch.tensor(bloom_slopes(config), dtype=torch.float32, device="cpu").bfloat16()
    return tuple(slope * by_head_dim(config) for slope in slopes.tolist())


GPT_NEOX = Architecture(Interleaved, attention="attention", grouped=False)
GPT_NEOX_JAPANESE = Architecture(Japanese, attention="attention", grouped=False)
PERSIMMON = Architecture(Persimmon, grouped=False)
FALCON = Architecture(
    Falcon,
    attention="self_attention",
    layers="h",
    heads=falcon_heads,
    rotates=lambda config, layer: not config.alibi,
    alibi=falcon_slopes,
    alibi_rounded=True,
    unused=("use_alibi",),
    grouped=False,
)
