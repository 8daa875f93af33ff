"""Each query and key head normed by itself, and attended values multiplied by a gate: afmoe, laguna."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture, typed_window
from kvcompile.adapters.families.glm import slides
from kvcompile.adapters.families.qwen3 import HeadNormed


class Gated(HeadNormed):
    """A gate of each number: afmoe."""

    layout = None
    keeps: ClassVar[tuple[str, ...]] = (*HeadNormed.keeps, "gate_proj")
    gate_proj: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """sigmoid(W h)."""
        return *super().project(states), torch.sigmoid(self.gate_proj(states))


class SoftGated(HeadNormed):
    """A gate of each number or head: laguna."""

    layout = None
    keeps: ClassVar[tuple[str, ...]] = (*HeadNormed.keeps, "g_proj")
    g_proj: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """log(1 + exp(W h)), in float32."""
        return *super().project(states), nn.functional.softplus(self.g_proj(states).float()).type_as(states)


AFMOE = Architecture(Gated, window=typed_window, rotates=slides)
LAGUNA = Architecture(
    SoftGated,
    window=typed_window,
    heads=lambda config, layer: (config.num_attention_heads_per_layer[layer], config.num_key_value_heads),
    rotary_per_type=True,
)
