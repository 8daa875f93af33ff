"""Three projections, each query and key head normed by itself: qwen3, gemma3."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture, by_scalar, typed_window
from kvcompile.adapters.base import Absent, Attention
from kvcompile.adapters.layout import Layout, Weights, norm_of
from kvcompile.adapters.llama import SeparateLayout


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
    """Norms over the channels of a head."""

    layout: ClassVar[type[Layout]] = HeadNormedLayout
    keeps: ClassVar[tuple[str, ...]] = (*Attention.keeps, "q_norm", "k_norm")
    q_norm: nn.Module
    k_norm: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norms over the last dimension of `[B, H, Q, D]`."""
        queries, keys, values = super().project(states)
        return self.q_norm(queries), self.k_norm(keys), values


QWEN3 = Architecture(HeadNormed, window=typed_window)
GEMMA3 = Architecture(HeadNormed, scale=by_scalar, window=typed_window, rotary_per_type=True)
