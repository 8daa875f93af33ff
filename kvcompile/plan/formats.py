"""Number formats by name: facts that a plan counts with, and the reference encode and decode. No torch at import.

Other packages add one as an entry point of the group `kvcompile.formats`; kernels are generated for those here and for
every `Table` of 4 bits, and the others are decoded by the library.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING

from kvcompile.errors import KvcompileError
from kvcompile.plan.extensions import with_extensions

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "kvcompile.formats"


@dataclass(frozen=True)
class NumberFormat:
    """Base of the number formats, and as it is one of plain floats.

    bits: of one code. dtype: of the stored elements, a torch dtype by name; codes below 8 bits are packed into `uint8`.
    parameters: what the numbers (float16) of each group mean, `scale` first; none: numbers are stored as they are.
    """

    name: str
    bits: int
    dtype: str
    parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise KvcompileError("names of number formats are of letters, digits and _", repr(self.name))
        packed = self.bits in (1, 2, 4) and self.dtype == "uint8"
        if not packed and (self.bits < 8 or self.bits % 8):
            raise KvcompileError(
                f"number format {self.name}: codes must be whole bytes, or 1, 2 or 4 bits packed into uint8",
                f"{self.bits} bits in {self.dtype}",
            )

    def encode(self, x: Tensor, along: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Codes of float32 numbers, and the parameters of each group.

        Args:
            x: numbers, any shape; those that differ in their place along `along` alone are a group.
            along: -1 or -2.

        Returns:
            Codes, shaped like `x` (not packed, of any dtype that converts to the stored one), and each of the
            `parameters`, float16, shaped like `x` but 1 long along `along`. Decoding must use the very numbers that
            encoding did: round them to float16 first.
        """
        raise KvcompileError(f"{self.name} is stored without scales", "a group that shares some", "use axis='none'")

    def decode(self, codes: Tensor, *parameters: Tensor) -> Tensor:
        """The numbers that codes stand for, in the dtype of the parameters, which broadcast over the codes."""
        raise KvcompileError(f"{self.name} is stored without scales", "a group that shares some", "use axis='none'")


@dataclass(frozen=True)
class Integer(NumberFormat):
    """x = code * scale + zero, scale = (max - min) / (2^bits - 1), zero = min. Constant groups have scale 0."""

    dtype: str = "uint8"
    parameters: tuple[str, ...] = ("scale", "zero")

    def encode(self, x: Tensor, along: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Codes rounded to nearest, ties to even."""
        levels = 2**self.bits - 1
        least, most = x.amin(along, keepdim=True), x.amax(along, keepdim=True)
        zero = least.half()
        scale = ((most - zero.float()) / levels).half()
        return ((x - zero.float()) / _never_zero(scale)).round().clamp(0, levels), (scale, zero)

    def decode(self, codes: Tensor, *parameters: Tensor) -> Tensor:
        """code * scale + zero."""
        scale, zero = parameters
        return codes.to(scale.dtype) * scale + zero


@dataclass(frozen=True)
class Float(NumberFormat):
    """x = code * scale, scale = max |x| / `largest`, the largest number that a code stands for."""

    parameters: tuple[str, ...] = ("scale",)
    largest: float = 448.0

    def encode(self, x: Tensor, along: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Codes as floats, which conversion to the stored dtype rounds."""
        scale = (x.abs().amax(along, keepdim=True) / self.largest).half()
        return (x / _never_zero(scale)).clamp(-self.largest, self.largest), (scale,)

    def decode(self, codes: Tensor, *parameters: Tensor) -> Tensor:
        """code * scale."""
        return codes.to(parameters[0].dtype) * parameters[0]


@dataclass(frozen=True)
class Table(NumberFormat):
    """x = levels[code] * scale, scale = max |x| / max |level|; levels ascend, 2^bits of them."""

    dtype: str = "uint8"
    parameters: tuple[str, ...] = ("scale",)
    levels: tuple[float, ...] = ()

    @property
    def largest(self) -> float:
        """The largest magnitude of a level."""
        return max(abs(level) for level in self.levels)

    @property
    def borders(self) -> list[float]:
        """Between each level and the next: numbers above it are nearer to the next."""
        return [(low + high) / 2 for low, high in zip(self.levels, self.levels[1:], strict=False)]

    def encode(self, x: Tensor, along: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Codes of the nearest levels."""
        scale = (x.abs().amax(along, keepdim=True) / self.largest).half()
        x, first, *others = x / _never_zero(scale), *self.borders
        codes = (x > first).byte()
        for border in others:
            codes = codes + (x > border)
        return codes, (scale,)

    def decode(self, codes: Tensor, *parameters: Tensor) -> Tensor:
        """levels[code] * scale."""
        (scale,) = parameters
        return scale.new_tensor(self.levels)[codes.long()] * scale


def normal_float() -> tuple[float, ...]:
    """The 16 levels of NormalFloat4: quantiles of N(0, 1) over their largest, with an exact 0.

    q_i = (Q(i / 17) + Q((i + 1) / 17)) / 2 in eq. 4 of QLoRA (arXiv 2305.14314), made asymmetric in its appendix E as
    in the authors' code: 8 quantiles above 0 and 7 below it, evenly from p = 1 - (1/32 + 1/30) / 2 to 1/2.
    """
    most = 1 - (1 / 32 + 1 / 30) / 2
    normal = NormalDist()
    above, below = (
        [normal.inv_cdf(most + (0.5 - most) * i / count) / normal.inv_cdf(most) for i in range(count)]
        for count in (8, 7)
    )
    return (*(-level for level in below), 0.0, *reversed(above))


BUILT_IN = {
    format.name: format
    for format in (
        NumberFormat("float64", 64, "float64"),
        NumberFormat("float32", 32, "float32"),
        NumberFormat("float16", 16, "float16"),
        NumberFormat("bfloat16", 16, "bfloat16"),
        Float("float8", 8, "float8_e4m3fn"),
        Integer("int8", 8),
        Integer("int4", 4),
        Integer("int2", 2),
        Table("nf4", 4, levels=normal_float()),
    )
}


def number_format(name: str) -> NumberFormat:
    """The format called `name`. Raises KvcompileError where there is none, with the names of all."""
    known = BUILT_IN.get(name) or installed().get(name)
    if known is None:
        raise KvcompileError(
            f"number formats are {', '.join({**BUILT_IN, **installed()})}",
            repr(name),
            f"install a package that registers it (entry point group {GROUP})",
        )
    return known


@cache
def installed() -> dict[str, NumberFormat]:
    """Formats of other packages, by name.

    Raises KvcompileError for one that does not load, is no format, or takes a name that is taken.
    """
    every = with_extensions(GROUP, "number format", BUILT_IN, "a NumberFormat", _is_format)
    return {name: known for name, known in every.items() if name not in BUILT_IN}


def _is_format(loaded: object, name: str) -> bool:
    return isinstance(loaded, NumberFormat) and loaded.name == name


def _never_zero(scale: Tensor) -> Tensor:
    wide = scale.float()
    return wide.where(wide > 0, 1.0)
