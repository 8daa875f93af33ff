"""In a softmax a learned logit of each query head, which goes to no value: gpt_oss, granite_swa, flint, mimo."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture, by_config, channels, typed_window
from kvcompile.adapters.base import Attention
from kvcompile.adapters.families.llama import SeparateLayout, by_multiplier
from kvcompile.adapters.families.qwen3 import HeadNormed, slides
from kvcompile.adapters.layout import Layout, Weights
from kvcompile.plan.plan import LayerPlan


@dataclass(frozen=True)
class SinkLayout(SeparateLayout):
    """Sinks go where their query heads go."""

    def read(self) -> Weights:
        """As views."""
        return replace(super().read(), sinks=self.attention.get_parameter("sinks").detach())

    def learned(self, new: Weights) -> dict[str, nn.Parameter]:
        """Sinks in the order of the query heads."""
        old = self.attention.get_parameter("sinks")
        return {} if new.sinks is None else {"sinks": nn.Parameter(new.sinks.clone(), old.requires_grad)}


class WithSinks(Attention):
    """softmax over [q k_j * scale, sink_h]; the sink's weight is dropped."""

    learned: ClassVar[tuple[str, ...]] = ("sinks",)
    layout: ClassVar[type[Layout] | None] = SinkLayout


class NormedWithSinks(HeadNormed):
    """The same, each query and key head normed by itself: flint."""

    layout = None
    learned: ClassVar[tuple[str, ...]] = WithSinks.learned


class GptOss(WithSinks):
    """The same, each angle given once."""

    @classmethod
    def angles(cls, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """Each angle comes once, for both halves of a head."""
        cos, sin = position_embeddings
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


class Mimo(WithSinks):
    """Sinks where the layer slides, values of other sizes than keys, times a number: mimo_v2_flash."""

    layout = None
    optional: ClassVar[tuple[str, ...]] = WithSinks.learned

    def __init__(self, original: nn.Module, plan: LayerPlan) -> None:
        super().__init__(original, plan)
        within: Any = original
        self.value_scale: float = within.v_scale

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """v = a W h."""
        queries, keys = self.heads(self.q_proj(states)), self.heads(self.k_proj(states))
        return queries, keys, self.value_heads(self.v_proj(states)) * self.value_scale


def twice_where_it_slides(config: Any, layer: int) -> tuple[int, int]:
    """Layers that slide have twice as many KV heads."""
    heads, kv_heads = by_config(config, layer)
    return heads, kv_heads * 2 if slides(config, layer) else kv_heads


def a_third(config: Any, layer: int) -> int:
    """By the factor of the layer's type, which is 0.334 unless said otherwise."""
    rope = config.rope_parameters[config.layer_types[layer]]
    return int(channels(config) * rope.get("partial_rotary_factor", 0.334))


def has_theta(config: Any, layer: int) -> bool:
    """Rotary positions in layers that have a base of their angles."""
    return bool(config.layer_rope_theta[layer])


def by_theta(base: Any, layer: int) -> nn.Module:
    """The rotary module of the layer's base."""
    theta = base.config.layer_rope_theta[layer]
    module: nn.Module = next(m for m in base.rotary_embs if m.config.rope_parameters["rope_theta"] == theta)
    return module


GPT_OSS = Architecture(GptOss, window=typed_window)
FLINT = Architecture(NormedWithSinks, window=typed_window, rotates=slides)
GRANITE_SWA = Architecture(
    WithSinks, scale=by_multiplier, window=typed_window, rotates=has_theta, rotary_module=by_theta
)
MIMO_V2_FLASH = Architecture(
    Mimo,
    heads=twice_where_it_slides,
    value_head=lambda config: int(config.v_head_dim),
    window=typed_window,
    turning=a_third,
    rotary_per_type=True,
    sinks=slides,
)
