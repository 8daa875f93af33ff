"""Positions without rotation: vectors added to the embeddings (gpt2, gpt_bigcode, gpt_neo, opt, biogpt, xglm).

Or logits that fall with the distance of tokens, at a slope of each head (bloom, mpt).

Queries and keys are not turned: what an entry says of its place stays what it was when it was read, and its distance is
that of true positions. Attention with linear biases, arXiv 2108.12409: softmax_j(q k_j * scale - m_h (p - p_j)).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture, by_head_dim
from kvcompile.adapters.base import Attention
from kvcompile.adapters.families.gpt_neox import Interleaved, bloom_slopes
from kvcompile.adapters.families.llama import Separate
from kvcompile.plan.plan import LayerPlan


class FusedGpt2(Attention):
    """One projection `c_attn`: all queries, all keys, all values."""

    keeps: ClassVar[tuple[str, ...]] = ("c_attn", "c_proj")
    optional: ClassVar[tuple[str, ...]] = ("attn_dropout", "resid_dropout")
    out: ClassVar[str] = "c_proj"
    turnable: ClassVar[bool] = False
    c_attn: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """`[B, Q, 3 H D]` in three."""
        queries, keys, values = torch.chunk(self.c_attn(states), 3, -1)
        return self.heads(queries), self.heads(keys), self.heads(values)


class BigCode(FusedGpt2):
    """The same with one KV head; with as many as query heads, the three of each head lie together."""

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """`[B, Q, (H + 2) D]`, or `[B, Q, H 3 D]`."""
        heads = self.heads(self.c_attn(states))
        if self.group > 1:
            queries, keys, values = torch.split(heads, [self.group, 1, 1], 1)
        else:
            queries, keys, values = torch.unflatten(heads, 1, (-1, 3)).unbind(2)
        return queries, keys, values

    def forward(self, hidden_states: Tensor, layer_past: Any = None, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """As the base; this family's layers call the cache `layer_past`."""
        return super().forward(hidden_states, past_key_values=layer_past, **kwargs)


class Learned(Separate):
    """Three projections and an output called `out_proj`: opt, biogpt, xglm."""

    layout = None
    keeps: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")
    out: ClassVar[str] = "out_proj"
    turnable: ClassVar[bool] = False


class GptNeo(Learned):
    """The same below a module of its own."""

    optional: ClassVar[tuple[str, ...]] = ("attn_dropout", "resid_dropout")

    def forward(self, hidden_states: Tensor, layer_past: Any = None, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """As the base; this family's layers call the cache `layer_past`."""
        return super().forward(hidden_states, past_key_values=layer_past, **kwargs)


class Bloom(Interleaved):
    """One projection, per head its query, its key and its value; the layer's residual is added in the attention."""

    layout = None
    turnable: ClassVar[bool] = False
    optional: ClassVar[tuple[str, ...]] = ("attention_dropout",)

    def forward(self, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """As the base, and the residual."""
        states, weights = super().forward(hidden_states, *args, **kwargs)
        return residual + states, weights


class Mpt(Attention):
    """One projection `Wqkv`, clipped where the config says so: all queries, all keys, all values."""

    keeps: ClassVar[tuple[str, ...]] = ("Wqkv", "out_proj")
    out: ClassVar[str] = "out_proj"
    turnable: ClassVar[bool] = False
    Wqkv: nn.Module

    def __init__(self, original: nn.Module, plan: LayerPlan) -> None:
        super().__init__(original, plan)
        within: Any = original
        self.most: float | None = within.clip_qkv

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """`[B, Q, 3 H D]` in three."""
        rows = self.Wqkv(states)
        rows = torch.clamp(rows, -self.most, self.most) if self.most else rows
        queries, keys, values = torch.chunk(rows, 3, -1)
        return self.heads(queries), self.heads(keys), self.heads(values)


def never(config: Any, layer: int) -> bool:
    """No rotary positions."""
    return False


def scaled_or_not(config: Any) -> float:
    """D^-1/2, or 1 where the config does not scale."""
    return by_head_dim(config) if config.scale_attn_weights else 1.0


def alone_or_all(config: Any, layer: int) -> tuple[int, int]:
    """One KV head, or as many as query heads."""
    heads = int(config.num_attention_heads)
    return heads, 1 if config.multi_query else heads


def local(config: Any, layer: int) -> int | None:
    """A window in layers that are local."""
    return int(config.window_size) if config.attention_layers[layer] == "local" else None


def mpt_slopes(config: Any) -> tuple[float, ...]:
    """2^(-8 i / c) of the least power of two c that has room for all heads, where it has more every other one first."""
    heads = int(config.num_attention_heads)
    whole = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
    return tuple(slopes if whole == heads else [*slopes[1::2], *slopes[::2]][:heads])


def mpt_scale(config: Any) -> float:
    """As the config says, or D^-1/2."""
    return float(config.attn_config.softmax_scale or by_head_dim(config))


GPT2 = Architecture(FusedGpt2, attention="attn", layers="h", rotates=never, scale=scaled_or_not, grouped=False)
GPT_BIGCODE = Architecture(
    BigCode, attention="attn", layers="h", rotates=never, scale=scaled_or_not, heads=alone_or_all, grouped=False
)
GPT_NEO = Architecture(
    GptNeo, attention="attn.attention", layers="h", rotates=never, scale=lambda config: 1.0, window=local, grouped=False
)
OPT = Architecture(Learned, layers="decoder.layers", rotates=never, grouped=False)
BIOGPT = Architecture(Learned, rotates=never, grouped=False)
BLOOM = Architecture(
    Bloom,
    attention="self_attention",
    layers="h",
    rotates=never,
    alibi=bloom_slopes,
    unused=("build_alibi_tensor",),
    grouped=False,
)
MPT = Architecture(
    Mpt,
    attention="attn",
    layers="blocks",
    rotates=never,
    scale=mpt_scale,
    alibi=mpt_slopes,
    unused=("build_mpt_alibi_tensor",),
    grouped=False,
)
