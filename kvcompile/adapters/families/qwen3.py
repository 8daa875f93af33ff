"""Three projections, each query and key head normed by itself: qwen3, gemma3, and families with other names for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture, by_scalar, one_window, typed_window
from kvcompile.adapters.base import Absent, Attention
from kvcompile.adapters.families.llama import SeparateLayout
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


def where_it_slides(config: Any, layer: int) -> bool:
    """Rotary positions in layers with a sliding window, or in all where the config has none."""
    return config.sliding_window is None or config.layer_types[layer] == "sliding_attention"


QWEN3 = Architecture(HeadNormed, window=typed_window)
QWEN3_MOE = Architecture(HeadNormed, window=one_window)
APERTUS = Architecture(HeadNormed)
GEMMA3 = Architecture(HeadNormed, scale=by_scalar, window=typed_window, rotary_per_type=True)
EXAONE4 = Architecture(HeadNormed, window=typed_window, rotates=where_it_slides)
MELLUM = Architecture(HeadNormed, window=typed_window, rotary_per_type=True)
GLM4_MOE = Architecture(MayNorm, normed=lambda config: bool(config.use_qk_norm))
STABLELM = Architecture(MayNormHeads, normed=lambda config: bool(config.qk_layernorm))
PHI = Architecture(Phi, normed=lambda config: bool(config.qk_layernorm))
HUNYUAN = Architecture(NormedBehind)
NANOCHAT = Architecture(NanoChat)
