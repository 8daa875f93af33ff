"""Three separate projections, as in llama and most families after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from kvcompile.adapters.architecture import Architecture, by_scalar, one_window, typed_window
from kvcompile.adapters.base import Absent, Attention
from kvcompile.adapters.layout import Layout, Weights, linear_of, plain


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

    layout: ClassVar[type[Layout]] = SeparateLayout


LLAMA = Architecture(Separate)
MISTRAL = Architecture(Separate, window=one_window)
MIXTRAL = Architecture(Separate, window=one_window)
QWEN2 = Architecture(Separate, window=typed_window)
SMOLLM3 = Architecture(Separate, window=typed_window, rotates=lambda config, layer: bool(config.no_rope_layers[layer]))
GRANITE = Architecture(Separate, scale=lambda config: float(config.attention_multiplier))
GEMMA2 = Architecture(
    Separate,
    scale=by_scalar,
    window=typed_window,
    softcap=lambda config: config.attn_logit_softcapping,
)
