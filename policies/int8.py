"""Keys and values as 8-bit integers, each token with its own scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcompile.plan.storage import Codec
from kvcompile.policies.quantized import QuantizedPolicy


@dataclass(frozen=True)
class Int8(QuantizedPolicy):
    """8-bit integers with a scale and a zero for each token of a KV head, keys and values alike.

    x = code * scale + zero, scale = (max - min) / 255, zero = min over the head's channels. A token's codes never
    change again, whatever is dropped around it.
    """

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "8-bit integers, a scale for each token"

    def codecs(self, dim: int) -> tuple[Codec, Codec]:
        """Per token, all channels together."""
        return Codec("int8", "token"), Codec("int8", "token")
