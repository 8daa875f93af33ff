"""Weights of linear layers in few bits, which a decode step reads in place of floats.

    int8:  w = scale (code - 128), codes 1 ... 255        int4:  w = low + scale code, codes 0 ... 15

A row of W is cut into groups of 32 along the inner dimension; each has a scale, and in int4 a lowest value, in fp16:
8.5 and 5 bits a weight. Sixteen rows lie together, so that a register holds four codes of each of them: the product of
a group is made of whole numbers, and sixteen sums are ready without a sum across lanes.

A decode step rounds what it multiplies them with to 8 bits as well, by group (`rounded`), as llama.cpp does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvcompile.errors import KvcompileError
from kvcompile.kernels.names import WEIGHTS

GROUP, BLOCK, FOUR = 32, 16, 4  # weights of a row with one scale; rows that lie together; codes of a row that do
ZERO = 128  # what int8 codes are counted from
# (share of a group's range, steps that it is cut into), all tried: fewer steps find a grid that weights lie on already
GRIDS = (*((1.0, steps) for steps in range(15, 7, -1)), *((share, 15) for share in (0.96, 0.92, 0.88, 0.84, 0.8)))
PIECE = 1 << 18  # weights that are rounded at a time: what a cache of a CPU holds


@dataclass(frozen=True, eq=False)
class Packed:
    """`shape = [N, K]` weights in a format, for products in a floating `dtype`.

    codes: uint8 `[N / 16, K / 32, bytes of a group of 16 rows]`, N rounded up: of every four along K, 16 rows of four
    codes; in int4 the first four in the low halves of the bytes, the next in the high ones. scales: fp16 bits, int16
    `[N / 16, K / 32, 16]`; lows: the same, of int4.
    """

    format: str
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    lows: Tensor | None
    dtype: torch.dtype


def require_packable(name: str, shape: tuple[int, int]) -> None:
    """Raise KvcompileError for rows that are no whole number of groups."""
    if shape[1] % GROUP:
        raise KvcompileError(
            f"weights in few bits have inner dimensions that are multiples of {GROUP}", f"{name}: {list(shape)}"
        )


@torch.no_grad()
def pack(weight: Tensor, format: str) -> Packed:
    """Round `weight [N, K]` to a format. Raises KvcompileError for an unknown one, and where K is no multiple of 32."""
    if format not in WEIGHTS:
        raise KvcompileError(f"weights in few bits are one of {', '.join(WEIGHTS)}", format)
    require_packable("a weight", (weight.shape[0], weight.shape[1]))
    rows = F.pad(weight.float(), (0, 0, 0, -weight.shape[0] % BLOCK))
    groups = torch.unflatten(rows, 1, (-1, GROUP))  # [N, K / 32, 32]
    if format == "int8":
        scales, lows = (groups.abs().amax(-1) / (ZERO - 1)).half(), None
        codes = _divided(groups, scales).round().clamp(1 - ZERO, ZERO - 1) + ZERO
    else:
        pieces = [_sixteen_values(piece) for piece in torch.split(groups, max(1, PIECE // rows.shape[1]))]
        scales, lows, codes = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return Packed(
        format,
        (weight.shape[0], weight.shape[1]),
        _together(codes.to(torch.uint8), format),
        _by_block(scales),
        None if lows is None else _by_block(lows),
        weight.dtype,
    )


def _divided(groups: Tensor, scales: Tensor) -> Tensor:
    """Groups in units of their scales; zero where a scale has rounded to nothing."""
    steps = scales.float().unsqueeze(-1)
    return torch.where(steps > 0, groups / steps, 0.0)


def _sixteen_values(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, lowest values and codes of 0 ... 15 with the least squared error over GRIDS."""
    first, last = groups.amin(-1), groups.amax(-1)
    best = torch.full_like(first, torch.inf)
    scales, lows = (torch.zeros(first.shape, dtype=torch.float16, device=first.device) for _ in range(2))
    codes = torch.zeros_like(groups)
    for share, steps in GRIDS:
        off = (last - first) * (1 - share) / 2
        scale, low = ((last - first) * share / steps).half(), (first + off).half()
        code = _divided(groups - low.float().unsqueeze(-1), scale).round().clamp(0, 15)
        error = (low.float().unsqueeze(-1) + scale.float().unsqueeze(-1) * code - groups).square().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales, lows = torch.where(better, scale, scales), torch.where(better, low, lows)
        codes = torch.where(better.unsqueeze(-1), code, codes)
    return scales, lows, codes


def _together(codes: Tensor, format: str) -> Tensor:
    """`[N, K / 32, 32]` codes as they lie."""
    blocks = torch.unflatten(torch.unflatten(codes, 0, (-1, BLOCK)), -1, (-1, FOUR))  # [N / 16, 16, K / 32, 8, 4]
    lying = blocks.permute(0, 2, 3, 1, 4)  # [N / 16, K / 32, 8, 16, 4]
    if format == "int4":
        lying = lying[:, :, ::2] | (lying[:, :, 1::2] << 4)
    return lying.flatten(2).contiguous()


def _by_block(x: Tensor) -> Tensor:
    """fp16 numbers `[N, K / 32]` as they lie, their bits: a model that is cast to another dtype keeps them."""
    return torch.unflatten(x, 0, (-1, BLOCK)).transpose(1, 2).contiguous().view(torch.int16)


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weights `[N, K]` as floats."""
    codes = packed.codes
    if packed.format == "int4":
        pairs = torch.unflatten(codes, -1, (-1, BLOCK * FOUR))
        codes = torch.stack((pairs & 15, pairs >> 4), 3)
    lying = codes.reshape(*packed.codes.shape[:2], GROUP // FOUR, BLOCK, FOUR).float()
    scales = packed.scales.view(torch.float16).float()[:, :, None, :, None]
    if packed.lows is None:
        weights = scales * (lying - ZERO)
    else:
        weights = packed.lows.view(torch.float16).float()[:, :, None, :, None] + scales * lying
    rows, inner = packed.shape
    return weights.permute(0, 3, 1, 2, 4).reshape(-1, inner)[:rows].to(dtype)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a decode step makes of `x [m, K]`: whole numbers of -127 to 127, and a scale a group, in float32.

    code = round(x 127 / max |x|), scale = max |x| / 127; with NaN or infinity in a group its scale is NaN.
    """
    groups = torch.unflatten(x.float(), -1, (-1, GROUP))
    most = groups.abs().amax(-1, keepdim=True)
    steps = torch.full_like(most, 127.0) / most  # `127 / most` would multiply by a rounded reciprocal
    codes = torch.where(most > 0, (groups * steps).round(), 0.0)
    finite = groups.isfinite().all(-1, keepdim=True)
    scales = torch.where(finite, most / 127, torch.nan)
    return torch.where(finite, codes, 0.0).flatten(-2), scales.squeeze(-1)


class PackedLinear(nn.Module):
    """y [..., N] = x [..., K] W^T + b with W in few bits, its codes and scales as buffers.

    Its own forward makes floats of all weights at every call; `kernels.cpp.lower` gives it one that reads the codes.
    twice: the same weights stand elsewhere too, as floats.
    """

    twice = False

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.format, (self.out_features, self.in_features) = packed.format, packed.shape
        self.codes: Tensor
        self.scales: Tensor
        self.like: Tensor
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("lows", packed.lows)
        # follows `.to(dtype)`, which leaves whole numbers alone
        self.register_buffer("like", torch.empty(0, dtype=packed.dtype, device=packed.codes.device), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def packed(self) -> Packed:
        """The weights as they lie."""
        own = self._buffers
        shape = self.out_features, self.in_features
        return Packed(self.format, shape, self.codes, self.scales, own["lows"], self.like.dtype)

    @property
    def weight(self) -> Tensor:
        """The weights `[N, K]` as floats, made at every look."""
        return unpack(self.packed, self.like.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The product, by PyTorch."""
        return F.linear(input, unpack(self.packed, input.dtype), self.bias)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


def hollow(shape: tuple[int, int], format: str, bias: bool, dtype: torch.dtype, device: torch.device) -> PackedLinear:
    """One of `shape = [N, K]` whose numbers are still to come."""
    (features, inner), blocks, groups = shape, -(-shape[0] // BLOCK), shape[1] // GROUP
    codes = torch.empty(blocks, groups, GROUP * BLOCK * WEIGHTS[format] // 8, dtype=torch.uint8, device=device)
    scales = torch.empty(blocks, groups, BLOCK, dtype=torch.int16, device=device)
    lows = torch.empty_like(scales) if format == "int4" else None
    packed = Packed(format, (features, inner), codes, scales, lows, dtype)
    return PackedLinear(packed, torch.empty(features, dtype=dtype, device=device) if bias else None)
