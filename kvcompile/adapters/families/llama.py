"""Three separate projections, as in llama and most families after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture, by_scalar, one_window, typed_window
from kvcompile.adapters.base import Absent, Attention
from kvcompile.adapters.layout import Layout, Weights, linear_of, plain
from kvcompile.plan.plan import LayerPlan


@dataclass(frozen=True)
class SeparateLayout(Layout):
    """Three projections."""

    def read(self) -> Weights:
        """As views."""
        return Weights(
            self.rows("q_proj", self.heads),
            self.rows("k_proj", self.kv_heads),
            self.rows("v_proj", self.kv_heads),
            self.output(),
        )

    def write(self, new: Weights) -> dict[str, nn.Module]:
        """New q, k, v and o projections."""
        modules = self.write_output(new)
        for name, part in (("q_proj", new.query), ("k_proj", new.key), ("v_proj", new.value)):
            modules[name] = Absent() if part is None else linear_of(plain(self.attention, name), [part])
        return modules


class Separate(Attention):
    """Three projections and nothing beside them."""

    layout: ClassVar[type[Layout] | None] = SeparateLayout


class Clips(Attention):
    """An attention whose projections are clipped where the config says so."""

    def __init__(self, original: nn.Module, plan: LayerPlan) -> None:
        super().__init__(original, plan)
        config: Any = original.config
        self.most: float | None = getattr(config, "attn_config", config).clip_qkv

    def clip(self, states: Tensor) -> Tensor:
        """Each number within -`clip_qkv` and `clip_qkv`."""
        return states if self.most is None else torch.clamp(states, -self.most, self.most)


class Clipped(Clips):
    """Three clipped projections: olmo."""

    in_float: ClassVar[bool] = True

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """Each number within the config's `clip_qkv`."""
        return tuple(self.clip(part) for part in super().project(states))


class SubNormed(Separate):
    """A norm between the attended values and the output projection: bitnet."""

    layout = None
    keeps: ClassVar[tuple[str, ...]] = (*Attention.keeps, "attn_sub_norm")
    attn_sub_norm: nn.Module

    def close(self, attended: Tensor) -> Tensor:
        """The norm."""
        normed: Tensor = self.attn_sub_norm(attended)
        return normed


class ModernBert(Separate):
    """An output called `Wo`: modernbert-decoder."""

    keeps: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "Wo")
    optional: ClassVar[tuple[str, ...]] = ("out_drop",)
    out: ClassVar[str] = "Wo"
    in_float: ClassVar[bool] = True


class Tempered(Separate):
    """Queries that grow with the logarithm of their position: ministral3."""

    layout = None
    turnable: ClassVar[bool] = False

    def __init__(self, original: nn.Module, plan: LayerPlan) -> None:
        super().__init__(original, plan)
        config: Any = original.config
        rope = config.rope_parameters
        self.growth, self.origin = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]

    def finish(self, queries: Tensor, keys: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """q (1 + beta log(1 + floor(position / original length)))."""
        steps = torch.floor(kwargs["position_ids"] / self.origin)
        grown = 1 + self.growth * torch.log(1 + steps)
        return queries * grown[:, None, :, None].to(queries.dtype), keys


def by_multiplier(config: Any) -> float:
    """Attention scaled by `attention_multiplier`."""
    return float(config.attention_multiplier)


class OnGrid(Separate):
    """Positions of time, height and width, which are not those of tokens in an image: qwen2_vl, qwen2_5_vl."""

    layout = None
    turnable: ClassVar[bool] = False


LLAMA = Architecture(Separate)
MISTRAL = Architecture(Separate, window=one_window)
MIXTRAL = Architecture(Separate, window=one_window)
QWEN2 = Architecture(Separate, window=typed_window)
QWEN_VL = Architecture(OnGrid, window=typed_window, grid=True)
SMOLLM3 = Architecture(Separate, window=typed_window, rotates=lambda config, layer: bool(config.no_rope_layers[layer]))
GRANITE = Architecture(Separate, scale=by_multiplier)
GEMMA2 = Architecture(
    Separate,
    scale=by_scalar,
    window=typed_window,
    softcap=lambda config: config.attn_logit_softcapping,
)
OLMO = Architecture(Clipped)
BITNET = Architecture(SubNormed)
MODERNBERT = Architecture(ModernBert, attention="attn", window=typed_window, rotary_per_type=True, grouped=False)
MINISTRAL3 = Architecture(Tempered, window=one_window)
