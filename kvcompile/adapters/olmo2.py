"""Three projections, queries and keys normed over all heads at once: olmo2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture
from kvcompile.adapters.base import Absent, Attention
from kvcompile.adapters.layout import Layout, Weights, norm_of
from kvcompile.adapters.llama import SeparateLayout


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
    """Norms over the channels of all heads."""

    layout: ClassVar[type[Layout]] = WidthNormedLayout
    keeps: ClassVar[tuple[str, ...]] = (*Attention.keeps, "q_norm", "k_norm")
    q_norm: nn.Module
    k_norm: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norms over `H * D` before the heads are split."""
        queries, keys = self.q_norm(self.q_proj(states)), self.k_norm(self.k_proj(states))
        return self.heads(queries), self.heads(keys), self.heads(self.v_proj(states))

    def rotate(self, queries: Tensor, keys: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """In float32, which this family's cos and sin have whatever the model's dtype, then cast back."""
        turned, keys_turned = super().rotate(queries, keys, position_embeddings)
        return turned.type_as(queries), keys_turned.type_as(keys)


OLMO2 = Architecture(WidthNormed)
