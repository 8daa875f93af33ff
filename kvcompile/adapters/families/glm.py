"""Channels that turn together lie side by side: glm, ernie4_5, helium, cohere.

Queries and keys are put into the half-split layout before they turn, both alike, so that their products stay and all
that is written for half-split keys holds.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcompile.adapters.architecture import Architecture, typed_window
from kvcompile.adapters.families.llama import Separate
from kvcompile.adapters.families.qwen3 import HeadNormed, MayNorm


class Paired(Separate):
    """Three projections; the rotary module gives each angle for both halves."""

    layout = None
    pairs: ClassVar[bool] = True


class PairedInFloat(Paired):
    """The same, turned in float32: ernie4_5."""

    in_float: ClassVar[bool] = True


def each_twice(position_embeddings: Any) -> tuple[Tensor, Tensor]:
    """Half-split angles of those that come twice in a row."""
    cos, sin = position_embeddings
    return torch.cat((cos[..., ::2],) * 2, -1), torch.cat((sin[..., ::2],) * 2, -1)


class Cohere(PairedInFloat):
    """The rotary module gives each angle twice in a row: cohere2."""

    @classmethod
    def angles(cls, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """As halves."""
        return each_twice(position_embeddings)


class CohereNormed(Cohere):
    """Norms with a weight of each head, where the config says so: cohere."""

    norms: ClassVar[tuple[str, ...]] = HeadNormed.norms
    optional: ClassVar[tuple[str, ...]] = MayNorm.optional

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """Norms over `[B, Q, H, D]`, before heads go in front."""
        queries, keys, values = super().project(states)
        query_norm, key_norm = (getattr(self, name, None) for name in self.norms)
        if query_norm is None or key_norm is None:
            return queries, keys, values
        return (
            query_norm(queries.transpose(1, 2)).transpose(1, 2),
            key_norm(keys.transpose(1, 2)).transpose(1, 2),
            values,
        )


def slides(config: Any, layer: int) -> bool:
    """Rotary positions in layers with a sliding window alone."""
    return bool(config.layer_types[layer] == "sliding_attention")


def slides_or_leads(config: Any, layer: int) -> bool:
    """The same, and in dense layers at the front where they are all to slide."""
    leads = config.mlp_layer_types[layer] == "dense" and config.prefix_dense_sliding_window_pattern == 1
    return slides(config, layer) or leads


GLM = Architecture(Paired)
ERNIE4_5 = Architecture(PairedInFloat)
COHERE = Architecture(CohereNormed, normed=lambda config: bool(config.use_qk_norm))
COHERE2 = Architecture(Cohere, window=typed_window, rotates=slides)
COHERE2_MOE = Architecture(Cohere, window=typed_window, rotates=slides_or_leads)
