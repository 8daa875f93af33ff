"""NormalFloat4: sixteen levels where numbers that are normally distributed lie, with a scale for each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcompile.plan.storage import Codec
from kvcompile.policies.quantized import QuantizedPolicy


@dataclass(frozen=True)
class NF4(QuantizedPolicy):
    """4-bit codes of the levels of NormalFloat4, keys and values alike (QLoRA, arXiv 2305.14314, eq. 4, appendix E).

    x = q[code] * scale, scale = max |x| over the group. q are 16 quantiles of a normal distribution over their
    largest, with an exact 0: they lie closest where most numbers are, near 0.

    group: channels of a token that share a scale (all, where the head has fewer); the paper takes 64.
    """

    name: ClassVar[str] = "nf4"
    summary: ClassVar[str] = "4-bit NormalFloat, a scale for each group of channels"
    group: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.group >= 1, "group", "1 or more")

    def codecs(self, dim: int) -> tuple[Codec, Codec]:
        """Per token, `group` channels together."""
        codec = Codec("nf4", "token", min(self.group, dim))
        return codec, codec
