"""Three projections, and in every softmax a learned logit of the query head, which goes to no value: gpt_oss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture, typed_window
from kvcompile.adapters.base import Attention
from kvcompile.adapters.families.llama import SeparateLayout
from kvcompile.adapters.layout import Layout, Weights


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

    @classmethod
    def angles(cls, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """Each angle comes once, for both halves of a head."""
        cos, sin = position_embeddings
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


GPT_OSS = Architecture(WithSinks, window=typed_window)
