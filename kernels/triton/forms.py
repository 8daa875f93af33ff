"""How a spec becomes tiles: channel blocks, tile lengths, and which fragment reads which codec. No Triton needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvcompile.errors import KvcompileError
from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.plan.storage import Codec

KINDS = ("float32", "float16", "bfloat16", "float8", "int8", "int4", "int2")  # what there are fragments for
SMALLEST = 16  # the shortest side of a matrix product on a tensor core
WIDEST = 256  # channels that go together; of wider vectors (latents) one block after the other is read and multiplied


@dataclass(frozen=True)
class Form:
    """What a kernel of a spec is built for beyond the spec.

    tokens: `one` new token or `many`. rows: query rows of a tile (a power of two). tile: entries of a tile at most.
    split: each row is shared by several programs and merged. work: `attend`, or `lse` (the log-sum-exp alone).
    """

    tokens: str = "one"
    rows: int = 16
    tile: int = 64
    split: bool = True
    work: str = "attend"


@dataclass(frozen=True)
class Blocks:
    """`dim` channels in blocks of `width`, padded to `wide` (a power of two), as every part of a spec can read them."""

    dim: int
    width: int

    @property
    def wide(self) -> int:
        """Channels of a block in registers."""
        return max(SMALLEST, power_of_two(self.width))

    @property
    def count(self) -> int:
        """Blocks of a vector."""
        return self.dim // self.width


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def pieces(codec: Codec) -> int:
    """Codes in one stored byte."""
    return max(1, 8 // codec.bits)


def blocks(dim: int, codecs: list[Codec]) -> Blocks:
    """The widest blocks such that none crosses a piece of a packed vector or a group of channels, in any part.

    No wider than WIDEST, where that divides into blocks of 64 channels or more.
    """
    width = dim
    for codec in codecs:
        width = math.gcd(width, dim // pieces(codec))
        if codec.axis == "token" and codec.group:
            width = math.gcd(width, codec.group)
    narrow = max(n for n in range(1, WIDEST + 1) if width % n == 0)
    return Blocks(dim, narrow if width > WIDEST and narrow >= 64 else width)


def key_blocks(spec: KernelSpec) -> Blocks:
    """Blocks of the keys and queries."""
    return blocks(spec.head_dim, [p.key for p in spec.parts])


def value_blocks(spec: KernelSpec) -> Blocks:
    """Blocks of the values and of the result."""
    return blocks(spec.value_dim, [p.value for p in spec.parts])


def tile(part: Part, most: int) -> int:
    """Entries of one tile: at most `most`, and inside one group of tokens where groups are long enough for that."""
    length = most
    for codec in (part.key, part.value):
        if codec.axis == "channel":
            alone = codec.group & -codec.group  # the largest power of two that divides the group
            if alone >= SMALLEST:
                length = min(length, alone)
    return length


def mode(codec: Codec, length: int) -> str:
    """Which fragments read a codec in tiles of `length`: `plain`, `token`, `channel` or `spread`."""
    if not codec.scaled:
        return "plain"
    if codec.axis == "channel" and codec.group % length:
        return "spread"
    return codec.axis


def one_page(part: Part, length: int) -> bool:
    """Whether no tile crosses pages."""
    return part.page % length == 0


def rows_for(spec: KernelSpec) -> int:
    """Query rows of a decode tile: the group, padded to what a matrix product takes."""
    return max(SMALLEST, power_of_two(spec.group))


def known(codec: Codec) -> None:
    """Raise KvcompileError for a number format that nothing here was written for."""
    if codec.kind not in KINDS:
        raise KvcompileError(f"kernels=triton knows {', '.join(KINDS)}", codec.name, "set kernels=reference")


def check(spec: KernelSpec) -> None:
    """Raise KvcompileError for a spec that no generated kernel covers."""
    if spec.bias or spec.alibi or spec.chunked:
        raise KvcompileError("kernels=triton has no bias and no chunks", spec.name, "set kernels=reference")
    for part in spec.parts:
        for codec, dim in ((part.key, spec.head_dim), (part.value, spec.value_dim)):
            known(codec)
            if dim % pieces(codec) or (codec.axis == "token" and codec.group and dim % codec.group):
                raise KvcompileError("channels must fill whole bytes and groups", f"{codec.name} of {dim} channels")
            if part.layout == "paged" and codec.axis == "channel" and part.page % codec.group:
                raise KvcompileError("a page must hold whole groups of tokens", part.name, "use another page size")
