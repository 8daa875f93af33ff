"""Three projections, each query and key head normed by itself: qwen3, gemma3 and gemma4, others by other names.

Also with attended values multiplied by a gate: afmoe, laguna, beam.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture, by_scalar, one_window, typed_window
from kvcompile.adapters.base import Absent, Attention
from kvcompile.adapters.families.llama import Separate, SeparateLayout
from kvcompile.adapters.layout import Layout, Weights, norm_of


@dataclass(frozen=True)
class HeadNormedLayout(SeparateLayout):
    """All key heads share the weight of their norm, `head_norm`; that of the queries is nobody's to change."""

    def read(self) -> Weights:
        """As views."""
        return replace(super().read(), head_norm=self.attention.get_parameter("k_norm.weight").detach())

    def write(self, new: Weights) -> dict[str, nn.Module]:
        """New projections, and the key norm."""
        modules = super().write(new)
        if new.key is None:
            modules["k_norm"] = Absent()
        elif new.head_norm is not None:
            modules["k_norm"] = norm_of(self.attention.get_submodule("k_norm"), new.head_norm)
        return modules


class HeadNormed(Attention):
    """Norms over the channels of a head, called as `norms` says."""

    layout: ClassVar[type[Layout] | None] = HeadNormedLayout
    norms: ClassVar[tuple[str, ...]] = ("q_norm", "k_norm")
    keeps: ClassVar[tuple[str, ...]] = (*Attention.keeps, "q_norm", "k_norm")

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """Norms over the last dimension of `[B, H, Q, D]`."""
        queries, keys, values = super().project(states)
        return self.normed(queries, 0), self.normed(keys, 1), values

    def normed(self, heads: Tensor, which: int) -> Tensor:
        """The heads normed, where the config has these norms: query heads (0) or key heads (1)."""
        norm: nn.Module | None = getattr(self, self.norms[which], None)
        return heads if norm is None else norm(heads)


class NormedOnGrid(HeadNormed):
    """The same, at positions of time, height and width: qwen3_vl."""

    layout = None
    turnable: ClassVar[bool] = False


class MayNorm(HeadNormed):
    """The same where the config says so: glm4_moe."""

    layout = None
    keeps: ClassVar[tuple[str, ...]] = Attention.keeps
    optional: ClassVar[tuple[str, ...]] = HeadNormed.norms


class MayNormHeads(MayNorm):
    """Norms with a weight of each head, where the config says so: stablelm."""

    norms: ClassVar[tuple[str, ...]] = ("q_layernorm", "k_layernorm")
    optional: ClassVar[tuple[str, ...]] = norms


class Phi(MayNorm):
    """The same with an output called `dense`: phi."""

    norms: ClassVar[tuple[str, ...]] = ("q_layernorm", "k_layernorm")
    keeps: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "dense")
    optional: ClassVar[tuple[str, ...]] = norms
    out: ClassVar[str] = "dense"


class NormedBehind(HeadNormed):
    """Norms behind the rotation, which a key that is turned on would need again: hunyuan."""

    layout = None
    turnable: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("query_layernorm", "key_layernorm")
    keeps: ClassVar[tuple[str, ...]] = (*Attention.keeps, *norms)

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """Without the norms."""
        return Attention.project(self, states)

    def finish(self, queries: Tensor, keys: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The norms."""
        return self.normed(queries, 0), self.normed(keys, 1)


class NanoChat(NormedBehind):
    """The same, turned the other way round: nanochat."""

    norms: ClassVar[tuple[str, ...]] = HeadNormed.norms
    keeps: ClassVar[tuple[str, ...]] = HeadNormed.keeps

    @classmethod
    def angles(cls, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """Those of -theta."""
        cos, sin = position_embeddings
        return cos, -sin


class Gated(HeadNormed):
    """A gate of each number: afmoe."""

    layout = None
    keeps: ClassVar[tuple[str, ...]] = (*HeadNormed.keeps, "gate_proj")
    gate_proj: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """sigmoid(W h)."""
        return *super().project(states), torch.sigmoid(self.gate_proj(states))


class Beam(Gated):
    """The gate with a bias of each head; queries without rotary positions grow: beam."""

    learned: ClassVar[tuple[str, ...]] = ("gate_bias",)
    turnable: ClassVar[bool] = False
    gate_bias: nn.Parameter

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """sigmoid(W h + b)."""
        gates = self.heads(self.gate_proj(states)) + self.gate_bias[:, None, None]
        return *HeadNormed.project(self, states), torch.sigmoid(gates.transpose(1, 2).flatten(-2))

    def finish(self, queries: Tensor, keys: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Queries times what the model gives for their positions."""
        growth = kwargs.get("attention_scaling")
        return queries if growth is None else (queries.float() * growth).to(queries.dtype), keys


class SoftGated(HeadNormed):
    """A gate of each number or head: laguna."""

    layout = None
    keeps: ClassVar[tuple[str, ...]] = (*HeadNormed.keeps, "g_proj")
    g_proj: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """log(1 + exp(W h)), in float32."""
        return *super().project(states), nn.functional.softplus(self.g_proj(states).float()).type_as(states)


def slides(config: Any, layer: int) -> bool:
    """Rotary positions in layers with a sliding window alone."""
    return bool(config.layer_types[layer] == "sliding_attention")


def has_rope(config: Any, layer: int) -> bool:
    """Rotary positions in layers whose type has them in the config."""
    return config.rope_parameters[config.layer_types[layer]] is not None


def where_it_slides(config: Any, layer: int) -> bool:
    """Rotary positions in layers with a sliding window, or in all where the config has none."""
    return config.sliding_window is None or config.layer_types[layer] == "sliding_attention"


class ValuesNormed(HeadNormed):
    """Norms of values too, which are the keys before their norm where these have no projection.

    Some layers read the keys and values of earlier ones: gemma3n, gemma4.
    """

    layout = None
    keeps: ClassVar[tuple[str, ...]] = (*HeadNormed.keeps, "v_norm")
    optional: ClassVar[tuple[str, ...]] = ("v_proj",)
    readers_lack: ClassVar[tuple[str, ...]] = ("k_proj", "v_proj", "k_norm", "v_norm")
    v_norm: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """Norms over the last dimension of `[B, H, Q, D]`."""
        keys = self.heads(self.k_proj(states))
        values = self.heads(self.v_proj(states)) if hasattr(self, "v_proj") else keys
        return self.normed(self.heads(self.q_proj(states)), 0), self.normed(keys, 1), self.v_norm(values)


def reads(config: Any, layer: int) -> int | None:
    """The last layer of the same type that has keys and values of its own, of one of those behind all such."""
    modes, types = config.kv_sharing_modes, config.layer_types
    if modes[layer] != "reuse":
        return None
    return max(i for i in range(layer) if types[i] == types[layer] and modes[i] != "reuse")


def heads(config: Any, layer: int) -> tuple[int, int]:
    """KV heads of its own number in some layers."""
    return int(config.num_attention_heads), int(config.per_layer_config[layer].num_key_value_heads)


def head_dim(config: Any, layer: int) -> int:
    """Longer heads in the layers that see all."""
    return int(config.per_layer_config[layer].head_dim)


QWEN3_VL = Architecture(NormedOnGrid, grid=True)
QWEN3 = Architecture(HeadNormed, window=typed_window)
QWEN3_MOE = Architecture(HeadNormed, window=one_window)
APERTUS = Architecture(HeadNormed)
GEMMA3 = Architecture(HeadNormed, scale=by_scalar, window=typed_window, rotary_per_type=True)
GEMMA3N = Architecture(ValuesNormed, scale=lambda config: 1.0, window=typed_window, rotary_per_type=True, reads=reads)
GEMMA4 = replace(GEMMA3N, heads=heads, head_dim=head_dim, turning=head_dim)
EXAONE4 = Architecture(HeadNormed, window=typed_window, rotates=where_it_slides)
MELLUM = Architecture(HeadNormed, window=typed_window, rotary_per_type=True)
GLM4_MOE = Architecture(MayNorm, normed=lambda config: bool(config.use_qk_norm))
STABLELM = Architecture(MayNormHeads, normed=lambda config: bool(config.qk_layernorm))
PHI = Architecture(Phi, normed=lambda config: bool(config.qk_layernorm))
HUNYUAN = Architecture(NormedBehind)
NANOCHAT = Architecture(NanoChat)
BEAM = Architecture(Beam, window=typed_window, rotates=has_rope, rotary_per_type=True)
COHERE_COMPASS = Architecture(Separate, window=typed_window, rotates=has_rope, rotary_per_type=True, grid=True)
AFMOE = Architecture(Gated, window=typed_window, rotates=slides)
LAGUNA = Architecture(
    SoftGated,
    window=typed_window,
    heads=lambda config, layer: (config.num_attention_heads_per_layer[layer], config.num_key_value_heads),
    rotary_per_type=True,
)
