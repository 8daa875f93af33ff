"""Attentions that cache one latent a token themselves (MLA): deepseek_v2, deepseek_v3 and those like them.

The cache of a compiled model holds the row `[k_R; c]` of each token, k_R turned and half-split, c behind its norm.
Queries are absorbed into it by `kv_b_proj`; a whole prompt is expanded to heads. Source: DeepSeek-V2, arXiv 2405.04434,
section 2.1.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture
from kvcompile.adapters.base import Attention
from kvcompile.adapters.families.glm import of_complex
from kvcompile.adapters.latent import UpProjection, absorbed, expansion
from kvcompile.graph import ops
from kvcompile.plan.plan import LayerPlan
from kvcompile.plan.structure import Latent


class NativeLatent(Attention):
    """Queries come through a latent of their own or not; channels turn side by side where the config says so."""

    keeps: ClassVar[tuple[str, ...]] = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    optional: ClassVar[tuple[str, ...]] = ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj")
    native: ClassVar[bool] = True
    interleaved: ClassVar[bool | None] = None  # None: as the config says
    q_a_proj: nn.Module
    q_a_layernorm: nn.Module
    q_b_proj: nn.Module
    kv_a_proj_with_mqa: nn.Module
    kv_a_layernorm: nn.Module
    kv_b_proj: UpProjection

    def __init__(self, original: nn.Module, plan: LayerPlan) -> None:
        super().__init__(original, plan)
        config: Any = original.config
        self.own_queries = hasattr(self, "q_proj")
        self.rank, self.rope = config.kv_lora_rank, config.qk_rope_head_dim
        self.plain, self.value = config.qk_nope_head_dim, config.v_head_dim
        self.side_by_side = config.rope_interleave if self.interleaved is None else self.interleaved
        self.kv_b_proj = UpProjection(original, "kv_b_proj")

    def compressed(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Heads of queries are `[q; q_R]`, what comes down is `[c; k_R]`."""
        queries = self.heads(self.queries(hidden_states))
        down = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        latent, keys = torch.split(down, [self.rank, self.rope], -1)
        plain, positioned = torch.split(queries, [self.plain, self.rope], -1)
        if self.side_by_side and self.rotary:
            positioned, keys = ops.halves(positioned, self.rope), ops.halves(keys, self.rope)
        needed = expansion(plain, self.kv_b_proj.weight)
        return absorbed(positioned, needed), torch.cat((keys, self.normed(latent)), -1), needed

    def queries(self, states: Tensor) -> Tensor:
        """Queries of all heads, `[B, Q, H D]`."""
        if self.own_queries:
            return self.q_proj(states)  # type: ignore[no-any-return]
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(states)))  # type: ignore[no-any-return]

    def normed(self, latent: Tensor) -> Tensor:
        """The latent as it is cached."""
        return self.kv_a_layernorm(latent)  # type: ignore[no-any-return]

    def turned(self, queries: Tensor, rows: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """Of queries and rows the part in front."""
        return self.rotate(queries, rows, position_embeddings) if self.rotary else (queries, rows)

    def up(self) -> Tensor:
        """The last rows of each head in `kv_b_proj`."""
        return torch.unflatten(self.kv_b_proj.weight, 0, (-1, self.plain + self.value))[:, self.plain :]


class HalfSplit(NativeLatent):
    """Channels that turn together half of them apart, or none that turn: minicpm3, kimi_linear."""

    interleaved = False


class Longcat(NativeLatent):
    """Queries, and latents behind their norm, times a number: longcat_flash."""

    interleaved = True

    def __init__(self, original: nn.Module, plan: LayerPlan) -> None:
        super().__init__(original, plan)
        within: Any = original
        self.query_scale: float = within.mla_scale_q_lora
        self.latent_scale: float = within.mla_scale_kv_lora

    def queries(self, states: Tensor) -> Tensor:
        """sqrt(hidden / rank of queries) q."""
        return super().queries(states) * self.query_scale

    def normed(self, latent: Tensor) -> Tensor:
        """sqrt(hidden / rank) c."""
        return super().normed(latent) * self.latent_scale


class Bailing(NativeLatent):
    """Attended values times a gate of each head: bailing_hybrid."""

    interleaved = True
    keeps: ClassVar[tuple[str, ...]] = (*NativeLatent.keeps, "g_proj")
    g_proj: nn.Module

    def gates(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """sigmoid(W h), in float32."""
        return (torch.sigmoid(self.g_proj(hidden_states).float()).to(hidden_states.dtype),)


class ByComplex(NativeLatent):
    """The rotary module gives complex numbers, which turn channels side by side in float32: deepseek_v2."""

    interleaved = True
    in_float: ClassVar[bool] = True

    @classmethod
    def angles(cls, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """Their real and imaginary parts, for both halves."""
        return of_complex(position_embeddings)


def query_dim(config: Any) -> int:
    """Channels of a query: those without position and those that turn."""
    return int(config.qk_nope_head_dim + config.qk_rope_head_dim)


def by_query_dim(config: Any) -> float:
    """D^-1/2, and what yarn makes of it."""
    rope, scale = getattr(config, "rope_parameters", None) or {}, query_dim(config) ** -0.5
    all_channels = rope.get("mscale_all_dim", 0) if rope.get("rope_type", "default") != "default" else 0
    if not all_channels or rope["factor"] <= 1:
        return float(scale)
    grown = 0.1 * all_channels * math.log(rope["factor"]) + 1.0
    return float(scale * grown * grown)


def one_row(config: Any, layer: int) -> tuple[int, int]:
    """All query heads, and the row that they share."""
    return int(config.num_attention_heads), 1


def own_row(config: Any) -> Latent:
    """The row of the model's own cache."""
    frequencies = tuple(range(config.qk_rope_head_dim // 2))
    return Latent(config.kv_lora_rank, frequencies, int(config.num_attention_heads), native=True)


DEEPSEEK_V3 = Architecture(
    NativeLatent,
    heads=one_row,
    head_dim=lambda config, layer: query_dim(config),
    scale=by_query_dim,
    turning=lambda config, layer: int(config.qk_rope_head_dim),
    latent=own_row,
)
DEEPSEEK_V2 = replace(DEEPSEEK_V3, adapter=ByComplex)
MINICPM3 = replace(DEEPSEEK_V3, adapter=HalfSplit)
LONGCAT_FLASH = replace(DEEPSEEK_V3, adapter=Longcat, in_layer=2)
