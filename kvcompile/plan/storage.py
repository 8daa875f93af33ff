"""How what stays is held: number formats, residual, pages. Names and numbers only (no torch at import)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvcompile.plan.formats import NumberFormat, number_format

Axis = Literal["none", "token", "channel"]
SCALE_BYTES = 2  # scales and zeros are float16; what they cannot hold is refused (see `cache.scales`)
SINKS = 4  # first tokens, whose keys are like no others: no mean is taken over them
FLUSH = 32  # decoded tokens between two encodings of a layer: some twenty small calls, however many rows they are for


@dataclass(frozen=True)
class Codec:
    """One number format of keys or values `[n, D]`, and which entries share its parameters (a scale, say, and a zero).

    kind: name of a `NumberFormat`. axis `token`: `group` channels of one token share them (0: all D).
    axis `channel`: `group` consecutive tokens of one channel share them; n is then a multiple of `group`.
    axis `none`: numbers are stored as they are. Codes below 8 bits are packed split-part: with P = 8 / bits,
    byte j holds channels j, j + D/P, j + 2D/P, ..., lowest bits first. Source of the axes: KIVI, arXiv 2402.02750.
    """

    kind: str
    axis: Axis = "none"
    group: int = 0

    @property
    def format(self) -> NumberFormat:
        """The number format. Raises KvcompileError where no package has one of this name."""
        return number_format(self.kind)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.format.bits

    @property
    def scaled(self) -> bool:
        """Whether codes come with scales."""
        return self.axis != "none"

    @property
    def parameters(self) -> int:
        """Numbers per group: the scale, say, and a zero."""
        return len(self.format.parameters)

    def width(self, dim: int) -> int:
        """Stored elements of one token: `dim`, or packed bytes."""
        return dim if self.bits >= 8 else dim * self.bits // 8

    def groups(self, dim: int) -> int:
        """Groups of channels that one token has its own scales for (axis `token`)."""
        return dim // (self.group or dim)

    def nbytes(self, tokens: int, dim: int) -> int:
        """Bytes of `tokens` tokens of `dim` channels, scales included."""
        size = tokens * dim * self.bits // 8
        if self.axis == "token":
            size += tokens * self.groups(dim) * self.parameters * SCALE_BYTES
        elif self.axis == "channel":
            size += tokens // self.group * dim * self.parameters * SCALE_BYTES
        return size

    @property
    def name(self) -> str:
        """Short and readable: `float32`, `int4c32` (per channel, 32 tokens), `int8t` (per token)."""
        if not self.scaled:
            return self.kind
        return f"{self.kind}{self.axis[0]}{self.group or ''}"


@dataclass(frozen=True)
class Storage:
    """How one layer's cache is held; `None` as a codec means the model's own dtype.

    `residual` newest tokens of each row stay in the model's dtype; older ones are encoded in blocks (see `block`).
    `page`: tokens a page (0: rows are contiguous). `rotated`: keys and values lie in the Hadamard basis. `centred`:
    keys are less their mean over so many tokens of text (0: they are as they are).
    `offload`: the store lies in host memory between its uses. `policy`: who chose the codecs, for messages.
    `low`: codecs (key, value) of a second, lower tier, for the entries that the layer's selection puts there (see
    `Selection.tiers`); `key` and `value` are then those of the high tier, which new tokens enter.
    """

    key: Codec | None = None
    value: Codec | None = None
    residual: int = 0
    page: int = 0
    rotated: bool = False
    centred: int = 0
    offload: bool = False
    policy: str = ""
    low: tuple[Codec, Codec] | None = None

    @property
    def quantized(self) -> bool:
        """Whether older tokens are held in another format than the model's."""
        return self.key is not None or self.value is not None

    @property
    def block(self) -> int:
        """Tokens that are encoded together: the longest group along tokens, 1 where every token has its own scales."""
        groups = [c.group for c in (self.key, self.value) if c is not None and c.axis == "channel"]
        return max([1, *groups])

    def encoded(self, tokens: int) -> int:
        """How many of a row's `tokens` (its oldest) are encoded after a flushed pass; the others are the residual."""
        if not self.quantized:
            return 0
        return max(0, tokens - self.residual) // self.block * self.block

    def codecs(self, dtype: str) -> tuple[Codec, Codec]:
        """(key, value) as encoded tokens are held, where the model's dtype is `dtype`."""
        return self.key or Codec(dtype), self.value or Codec(dtype)

    def nbytes(self, tokens: int, dim: int, dtype: str, low: int = 0, value_dim: int | None = None) -> int:
        """Bytes of keys and values of a row of `tokens` after a flushed pass: codes, scales, residual.

        dim: channels of a key, and of a value where `value_dim` is None. low: how many of them are in the low tier.
        """
        old, plain, dims = self.encoded(tokens), Codec(dtype), (dim, dim if value_dim is None else value_dim)
        quantized = sum(codec.nbytes(old - low, d) for codec, d in zip(self.codecs(dtype), dims, strict=True))
        quantized += sum(codec.nbytes(low, d) for codec, d in zip(self.low or (), dims, strict=False))
        return quantized + plain.nbytes(tokens - old, sum(dims))

    def latent_nbytes(self, tokens: int, width: int, dtype: str) -> int:
        """The same of a row of latents, which are stored as keys are and hold the values too."""
        old = self.encoded(tokens)
        return self.codecs(dtype)[0].nbytes(old, width) + Codec(dtype).nbytes(tokens - old, width)

    def text(self, dtype: str) -> str:
        """For tables: `float32`, or `K int4c32, V int4t32, newest 128 float32`, `offloaded`."""
        basis, place = " centred" * bool(self.centred) + " rotated" * self.rotated, ", offloaded" * self.offload
        if not self.quantized:
            return dtype + basis + place
        kinds = " or ".join(_kinds(*codecs) for codecs in (self.codecs(dtype), self.low) if codecs)
        return f"{kinds}{basis}" + (f", newest {self.residual} {dtype}" if self.residual else "") + place


def _kinds(key: Codec, value: Codec) -> str:
    return key.name if key == value else f"K {key.name}, V {value.name}"


PLAIN = Storage()
