"""Keys and values as 8-bit floats, each token with its own scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcompile.plan.storage import Codec
from kvcompile.policies.quantized import QuantizedPolicy


@dataclass(frozen=True)
class FP8(QuantizedPolicy):
    """8-bit floats (e4m3) with a scale for each token of a KV head, keys and values alike.

    x = code * scale, scale = max |x| / 448 over the head's channels: 3 bits of mantissa, a relative error up to 1/16.
    """

    name: ClassVar[str] = "fp8"
    summary: ClassVar[str] = "8-bit floats (e4m3), a scale for each token"

    def codecs(self, dim: int) -> tuple[Codec, Codec]:
        """Per token, all channels together."""
        return Codec("float8", "token"), Codec("float8", "token")
