"""Channels that turn together lie side by side: glm, ernie4_5, helium, cohere, llama4, gptj, codegen.

Queries and keys are put into the half-split layout before they turn, both alike, so that their products stay and all
that is written for half-split keys holds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture, typed_window
from kvcompile.adapters.base import Attention
from kvcompile.adapters.families.llama import Separate
from kvcompile.adapters.families.qwen3 import HeadNormed, MayNorm, slides
from kvcompile.graph import ops
from kvcompile.plan.plan import LayerPlan


class Paired(Separate):
    """Three projections; the rotary module gives each angle for both halves."""

    layout = None
    pairs: ClassVar[bool] = True


class PairedInFloat(Paired):
    """The same, turned in float32: ernie4_5."""

    in_float: ClassVar[bool] = True


def of_complex(position_embeddings: Any) -> tuple[Tensor, Tensor]:
    """Half-split angles of complex numbers, one for each pair of channels."""
    cos, sin = torch.unbind(torch.view_as_real(position_embeddings), -1)
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def each_twice(position_embeddings: Any) -> tuple[Tensor, Tensor]:
    """Half-split angles of those that come twice in a row."""
    cos, sin = position_embeddings
    return torch.cat((cos[..., ::2],) * 2, -1), torch.cat((sin[..., ::2],) * 2, -1)


class Cohere(PairedInFloat):
    """The rotary module gives each angle twice in a row: cohere2."""

    @classmethod
    def angles(cls, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """As halves."""
        return each_twice(position_embeddings)


class CohereNormed(Cohere):
    """Norms with a weight of each head, where the config says so: cohere."""

    norms: ClassVar[tuple[str, ...]] = HeadNormed.norms
    optional: ClassVar[tuple[str, ...]] = MayNorm.optional

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """Norms over `[B, Q, H, D]`, before heads go in front."""
        queries, keys, values = super().project(states)
        query_norm, key_norm = (getattr(self, name, None) for name in self.norms)
        if query_norm is None or key_norm is None:
            return queries, keys, values
        return (
            query_norm(queries.transpose(1, 2)).transpose(1, 2),
            key_norm(keys.transpose(1, 2)).transpose(1, 2),
            values,
        )


class Llama4(Paired):
    """Complex angles, heads of length 1 behind the rotation; without rotary positions, queries that grow: llama4."""

    in_float: ClassVar[bool] = True
    turnable: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("qk_norm", "qk_norm")
    optional: ClassVar[tuple[str, ...]] = ("qk_norm",)

    def __init__(self, original: nn.Module, plan: LayerPlan) -> None:
        super().__init__(original, plan)
        config: Any = original.config
        self.grows, self.growth, self.origin = config.attn_temperature_tuning, config.attn_scale, config.floor_scale

    @classmethod
    def angles(cls, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """Their real and imaginary parts, for both halves."""
        return of_complex(position_embeddings)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the base; this family's layers hand on no positions of tokens."""
        kwargs["position_ids"] = ops.positions(attention_mask)
        return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)

    def finish(self, queries: Tensor, keys: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The norm of both, where the config has it.

        Or, without rotary positions, queries times 1 + a log(1 + floor((position + 1) / floor scale)).
        """
        if self.rotary:
            norm: nn.Module | None = getattr(self, "qk_norm", None)
            return (queries, keys) if norm is None else (norm(queries), norm(keys))
        if not self.grows:
            return queries, keys
        steps = torch.floor((kwargs["position_ids"].float() + 1) / self.origin)
        grown = torch.log1p(steps) * self.growth + 1
        return (queries * grown[:, None, :, None]).to(queries.dtype), keys


class Sinusoids(nn.Module):
    """A table of angles `[positions, D_rot]`, sines in front of cosines, as a rotary module."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Buffer(table, persistent=False)

    def forward(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[B, Q, D_rot / 2]` of positions `[B, Q]`, in the dtype of `like`."""
        sin, cos = self.table[position_ids].to(like.dtype).chunk(2, -1)
        return cos, sin


class GptJ(Attention):
    """Three projections and an output called `out_proj`; each attention has a table of angles: gptj."""

    keeps: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")
    optional: ClassVar[tuple[str, ...]] = ("attn_dropout", "resid_dropout")
    out: ClassVar[str] = "out_proj"
    pairs: ClassVar[bool] = True

    def __init__(self, original: nn.Module, plan: LayerPlan) -> None:
        super().__init__(original, plan)
        self.sinusoids = Sinusoids(original.get_buffer("embed_positions"))

    @classmethod
    def angles(cls, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """Each angle comes once."""
        cos, sin = position_embeddings
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def forward(self, hidden_states: Tensor, layer_past: Any = None, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """As the base; this family's layers call the cache `layer_past` and look angles up themselves."""
        kwargs["position_embeddings"] = self.sinusoids(hidden_states, kwargs["position_ids"])
        return super().forward(hidden_states, past_key_values=layer_past, **kwargs)


class CodeGen(GptJ):
    """One projection: in each of four parts the queries, values and keys of a fourth of the heads: codegen."""

    keeps: ClassVar[tuple[str, ...]] = ("qkv_proj", "out_proj")
    qkv_proj: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """`[B, Q, 4, 3, H / 4 * D]`, by kind."""
        parts = torch.unflatten(self.qkv_proj(states), -1, (4, 3, -1))
        queries, values, keys = torch.unbind(parts, -2)
        return self.heads(queries.flatten(-2)), self.heads(keys.flatten(-2)), self.heads(values.flatten(-2))


def chunks(config: Any, layer: int) -> bool:
    """Layers that see the chunk of their tokens."""
    return bool(config.layer_types[layer] == "chunked_attention")


def chunk(config: Any, layer: int) -> int | None:
    """Its length."""
    return int(config.attention_chunk_size) if chunks(config, layer) else None


def slides_or_leads(config: Any, layer: int) -> bool:
    """Rotary positions in layers that slide, and in dense layers at the front where they are all to slide."""
    leads = config.mlp_layer_types[layer] == "dense" and config.prefix_dense_sliding_window_pattern == 1
    return slides(config, layer) or leads


def table(base: Any, layer: int) -> nn.Module:
    """The rotary module of a base model: the table of a layer."""
    return Sinusoids(base.h[layer].attn.embed_positions)


def rotary_dim(config: Any, layer: int) -> int:
    """Channels of a head that turn."""
    return int(config.rotary_dim)


def without_rotary_dim(config: Any) -> str | None:
    """Of both, what turns a part of a head."""
    return None if config.rotary_dim else "rotary_dim is not set"


GLM = Architecture(Paired)
ERNIE4_5 = Architecture(PairedInFloat)
COHERE = Architecture(CohereNormed, normed=lambda config: bool(config.use_qk_norm))
COHERE2 = Architecture(Cohere, window=typed_window, rotates=slides)
COHERE2_MOE = Architecture(Cohere, window=typed_window, rotates=slides_or_leads)
LLAMA4 = Architecture(
    Llama4,
    window=chunk,
    chunked=chunks,
    rotates=lambda config, layer: bool(config.no_rope_layers[layer]),
    normed=lambda config: bool(config.use_qk_norm),
)
GPTJ = Architecture(
    GptJ,
    attention="attn",
    layers="h",
    turning=rotary_dim,
    rotary_module=table,
    refuses=without_rotary_dim,
    grouped=False,
)
CODEGEN = replace(GPTJ, adapter=CodeGen)
