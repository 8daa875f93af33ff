"""Three projections, queries and keys normed over all heads at once: olmo2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture, typed_window
from kvcompile.adapters.base import Absent, Attention
from kvcompile.adapters.families.llama import Clips, SeparateLayout
from kvcompile.adapters.layout import Layout, Weights, norm_of


@dataclass(frozen=True)
class WidthNormedLayout(SeparateLayout):
    """A weight of the norm belongs to each row."""

    def read(self) -> Weights:
        """As views."""
        weights = super().read()
        for part, name, heads in ((weights.query, "q_norm", self.heads), (weights.key, "k_norm", self.kv_heads)):
            if part is not None:
                part.norm = self.attention.get_parameter(f"{name}.weight").detach().view(heads, -1)
        return weights

    def write(self, new: Weights) -> dict[str, nn.Module]:
        """New projections, and norms as wide as they are."""
        modules = super().write(new)
        if new.key is None:
            modules["k_norm"] = Absent()
        for part, name in ((new.query, "q_norm"), (new.key, "k_norm")):
            if part is not None and part.norm is not None:
                modules[name] = norm_of(self.attention.get_submodule(name), part.norm.flatten())
        return modules


class WidthNormed(Attention):
    """Norms over the channels of all heads; cos and sin are float32 whatever the model's dtype."""

    in_float: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("q_norm", "k_norm")
    layout: ClassVar[type[Layout] | None] = WidthNormedLayout
    keeps: ClassVar[tuple[str, ...]] = (*Attention.keeps, "q_norm", "k_norm")
    q_norm: nn.Module
    k_norm: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """Norms over `H * D` before the heads are split."""
        queries, keys = self.q_norm(self.q_proj(states)), self.k_norm(self.k_proj(states))
        return self.heads(queries), self.heads(keys), self.heads(self.v_proj(states))


class WidthNormedAsIs(WidthNormed):
    """The same, turned in the model's dtype: minimax_m2."""

    in_float: ClassVar[bool] = False


class WidthNormedClipped(Clips, WidthNormed):
    """The same, clipped behind the norms: olmoe."""

    layout = None

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """Each number within the config's `clip_qkv`."""
        return tuple(self.clip(part) for part in super().project(states))


OLMO2 = Architecture(WidthNormed)
OLMO3 = Architecture(WidthNormed, window=typed_window)
OLMOE = Architecture(WidthNormedClipped)
MINIMAX_M2 = Architecture(WidthNormedAsIs)
