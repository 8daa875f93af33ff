"""KIVI: asymmetric integers, keys per channel, values per token, and a residual of recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvcompile.plan.storage import Codec
from kvcompile.policies.quantized import QuantizedPolicy

BITS = (2, 4, 8)


@dataclass(frozen=True)
class KIVI(QuantizedPolicy):
    """Old tokens as integers of 2, 4 or 8 bits with a scale and a zero a group (arXiv 2402.02750).

    x = code * scale + zero, scale = (max - min) / (2^bits - 1), zero = min. Keys: groups of `group` tokens of a channel
    (outliers sit in channels); values: groups of `group` channels of a token (of all, where the head has fewer).
    Tokens older than the `residual` newest are encoded after each prefill, and while decoding in whole groups; the
    paper encodes keys `residual` at a time, and values one by one.

    bits: of keys and of values. key_bits, value_bits: bits of the one, over `bits`.
    group: numbers that share a scale and a zero. residual: newest tokens that keep the model's dtype, a multiple of
    `group`.
    key_axis: `token` gives keys scales as values have them: rows need no whole groups of tokens then, so short rows
    are encoded to the last token; best after `rotate`, which spreads the outliers of a channel over the head.
    """

    name: ClassVar[str] = "kivi"
    summary: ClassVar[str] = "2, 4 or 8 bit integers: keys per channel, values per token"
    bits: int = 4
    key_bits: int | None = None
    value_bits: int | None = None
    group: int = 32
    residual: int = 128
    key_axis: Literal["channel", "token"] = "channel"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bits", "key_bits", "value_bits"):
            chosen = getattr(self, name)
            self.require(chosen in BITS or (chosen is None and name != "bits"), name, "2, 4 or 8")
        self.require(self.group >= 1, "group", "1 or more")
        self.require(self.key_axis in ("channel", "token"), "key_axis", "channel or token")
        whole = self.key_axis == "token" or self.residual % self.group == 0
        self.require(whole, "residual", f"a multiple of the group, {self.group}")

    def codecs(self, dim: int) -> tuple[Codec, Codec]:
        """Per channel, per token."""
        key, value = self.key_bits or self.bits, self.value_bits or self.bits
        values = min(self.group, dim)
        keys = values if self.key_axis == "token" else self.group
        return Codec(f"int{key}", self.key_axis, keys), Codec(f"int{value}", "token", values)
