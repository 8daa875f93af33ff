"""How stored keys and values become vectors of floats: one emitter for each number format and each axis of scales.

The channels of one entry are read in `runs` of `lanes` <= 16 stored elements. Codes below 8 bits are packed
split-part (see `kvcompile.plan.storage.Codec`): with `pieces` = 8 / bits, a run gives `pieces` vectors, whose channels
lie D / pieces apart. A `slot` is the place of one such vector: slot `i * runs + c` is piece i of run c.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import gcd

from kvcompile.plan.formats import Integer, Table
from kvcompile.plan.storage import Codec

ELEMENTS = {
    "float32": "float",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8": "e4m3",
    "int8": "uint8_t",
    "int4": "uint8_t",
    "int2": "uint8_t",
}

CLOSEST = 1 / 64  # levels of a table that are closer than that, relative to the largest, stay floats


def emitted(codec: Codec) -> bool:
    """Whether there is C++ for a number format: those above, and all that are but a table of 16 numbers."""
    return codec.kind in ELEMENTS or table(codec) is not None


def table(codec: Codec) -> Table | None:
    """The table of 16 levels in which codes are looked up. A class that derives from `Table` may decode otherwise."""
    format = codec.format
    return format if type(format) is Table and format.bits == 4 else None


@dataclass(frozen=True)
class FixedPoint:
    """Levels of a table as whole numbers, `most` for the largest: each is off by 1 / (2 most) of that at most."""

    table: Table
    most: int

    @property
    def array(self) -> str:
        """What they are called in C++."""
        return f"{self.table.name}_levels_{self.most}"

    @property
    def levels(self) -> list[int]:
        """One for each code."""
        return [round(level * self.most / self.table.largest) for level in self.table.levels]

    @property
    def unit(self) -> str:
        """What 1 stands for, as a C++ float."""
        return decimal(self.table.largest / self.most)


def decimal(x: float) -> str:
    """A C++ float."""
    text = f"{x:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


@dataclass(frozen=True)
class Stored:
    """Keys or values of `dim` channels in the format `codec`."""

    codec: Codec
    dim: int

    @property
    def element(self) -> str:
        """C++ type of a stored element."""
        return ELEMENTS.get(self.codec.kind, "uint8_t")

    @property
    def width(self) -> int:
        """Stored elements of one entry."""
        return self.codec.width(self.dim)

    @property
    def pieces(self) -> int:
        """Channels in one stored element."""
        return self.dim // self.width

    @property
    def lanes(self) -> int:
        """Stored elements of a run: as many as fit a vector, divide the entry and share their scale."""
        within = gcd(self.width, self.codec.group) if self.scales == "groups" else self.width
        return max(n for n in range(1, 17) if within % n == 0)

    @property
    def runs(self) -> int:
        """Runs of one entry."""
        return self.width // self.lanes

    @property
    def slots(self) -> int:
        """Vectors of one entry."""
        return self.runs * self.pieces

    @property
    def scales(self) -> str:
        """Who shares a scale: `none`, all of a `token`, `groups` of its channels, a `channel`'s consecutive tokens."""
        if self.codec.axis != "token":
            return self.codec.axis
        return "token" if self.codec.groups(self.dim) == 1 else "groups"

    @property
    def whole(self) -> bool:
        """Whether codes are multiplied as whole numbers: those that are, and levels of a table in fixed point.

        Levels stay floats where two are so close that fixed point would not round far less off than the format does.
        """
        levels = self.table
        if levels is None:
            return isinstance(self.codec.format, Integer)
        return min(high - low for low, high in pairwise(levels.levels)) >= CLOSEST * levels.largest

    @property
    def table(self) -> Table | None:
        """The levels that codes stand for, if that is all that the format is."""
        return table(self.codec)

    @property
    def numbers(self) -> int:
        """Scales and zeros of one token (axis `token`)."""
        return self.codec.parameters * self.codec.groups(self.dim)

    @property
    def zeros(self) -> bool:
        """Whether there are zeros beside the scales."""
        return self.codec.scaled and self.codec.parameters == 2

    def channel(self, piece: int, run: str) -> str:
        """First channel of the vector in this slot."""
        first = f"{piece * self.width} + " if piece else ""
        return f"{first}{run} * {self.lanes}"

    def group(self, piece: int, run: str) -> str:
        """The group of channels that the vector in this slot belongs to (axis `token`)."""
        return f"({self.channel(piece, run)}) / {self.codec.group or self.dim}"

    def slot(self, piece: int, run: str) -> str:
        """Where the vector lies among those of the entry, in floats."""
        return f"({piece * self.runs} + {run}) * 16" if piece else f"{run} * 16"

    def part(self, array: str, piece: int, run: str) -> str:
        """The vector of floats at the channels of this slot of an array `[dim]`."""
        count = "" if self.lanes == 16 else f", {self.lanes}"
        return f"load({array} + {self.channel(piece, run)}{count})"

    def codes(self, entry: str, run: str) -> list[str]:
        """The vectors of one run as stored, scales left out. A new number format is a line here and a `load`."""
        at = f"{entry} + {run} * {self.lanes}"
        count = "" if self.lanes == 16 else f", {self.lanes}"
        if self.codec.bits >= 8:
            return [f"load({at}{count})"]
        bits = self.codec.bits
        if table(self.codec):
            return [f"look_up<{i * bits}>({self.codec.kind}_levels, {at}{count})" for i in range(self.pieces)]
        return [f"load_field<{i * bits}, {bits}>({at}{count})" for i in range(self.pieces)]

    def fields(self, x: str, at: str, fixed: FixedPoint | None) -> str:
        """The whole numbers (`C`) that codes from bit `at` of every sixteen stand for."""
        return f"look_up({fixed.array}, {x}, {at})" if fixed else f"field({x}, {at}, {self.codec.bits})"

    def decoded(self, entry: str, run: str, numbers: str) -> list[str]:
        """The vectors of one run as floats, where scales must be applied to each channel (`groups`, `channel`).

        `numbers`: where the scales lie as floats: `[parameters, groups, TILE]`, from the token's on, or
        `[parameters, slots * 16]`.
        """
        out = []
        for i, code in enumerate(self.codes(entry, run)):
            if self.scales == "groups":
                group = self.group(i, run)
                zeros = f"({self.codec.groups(self.dim)} + {group})"
                scale, zero = (f"set({numbers}[{place} * TILE])" for place in (group, zeros))
            else:
                place = self.slot(i, run)
                scale, zero = (f"load({numbers} + {o}{place})" for o in ("", f"{self.slots * 16} + "))
            out.append(self.applied(code, scale, zero))
        return out

    def applied(self, code: str, scale: str, zero: str) -> str:
        """The vector that a code stands for."""
        return f"mul_add({code}, {scale}, {zero})" if self.zeros else f"{code} * {scale}"
