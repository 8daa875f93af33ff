"""Number formats in plain PyTorch: what every kernel that reads or writes stored codes is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.plan.storage import Codec

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
    "int8": torch.uint8,
    "int4": torch.uint8,
    "int2": torch.uint8,
}
FLOAT8_MAX = 448.0
Encoder = Callable[[Tensor, Codec], tuple[Tensor, Tensor | None]]  # the contract of `encode`


def encode(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor | None]:
    """Codes `[..., n, W]` and scales (see `layout`) of `x [..., n, D]`.

    Integers: scale = (max - min) / (2^bits - 1), zero = min over each group, both rounded to float16 before the
    codes are taken, so that decoding uses the very numbers that encoding did; a constant group has scale 0, codes 0.
    """
    _require_known(codec)
    if not codec.scaled:
        return x.to(DTYPES[codec.kind]), None
    grouped = _grouped(x.float(), codec)
    if codec.kind == "float8":
        scales = (grouped.abs().amax(-2 if codec.axis == "channel" else -1, keepdim=True) / FLOAT8_MAX).half()
        codes = (grouped / _never_zero(scales)).clamp(-FLOAT8_MAX, FLOAT8_MAX)
        return codes.reshape(x.shape).to(torch.float8_e4m3fn), _stacked(codec, scales)
    along = -2 if codec.axis == "channel" else -1
    levels = 2**codec.bits - 1
    least, most = grouped.amin(along, keepdim=True), grouped.amax(along, keepdim=True)
    zero = least.half()
    scale = ((most - zero.float()) / levels).half()
    codes = ((grouped - zero.float()) / _never_zero(scale)).round().clamp(0, levels).to(torch.uint8)
    return pack(codes.reshape(x.shape), codec.bits), _stacked(codec, scale, zero)


def decode(codes: Tensor, scales: Tensor | None, codec: Codec, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[..., n, D]` from what `encode` gave: code * scale + zero."""
    _require_known(codec)
    if scales is None:
        return codes.to(dtype)
    values = codes.to(dtype) if codec.kind == "float8" else unpack(codes, codec.bits).to(dtype)
    grouped = _grouped(values, codec)
    numbers = scales.to(dtype)
    # channel: [..., n/g, 1, D] against [..., n/g, g, D]; token: [..., n, D/g, 1] against [..., n, D/g, g]
    split = torch.split(numbers if codec.axis == "channel" else numbers.unsqueeze(-1).transpose(-3, -2), 1, -2)
    split = split if codec.axis == "channel" else tuple(x.squeeze(-2) for x in split)
    decoded: Tensor = grouped * split[0]
    if len(split) == 2:
        decoded = decoded + split[1]
    return decoded.reshape(values.shape)


def _require_known(codec: Codec) -> None:
    if codec.kind not in DTYPES:
        raise KvcompileError(f"number formats are {', '.join(DTYPES)}", codec.name)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., D]` (uint8) below 8 bits into `[..., D * bits / 8]` bytes, split-part."""
    if bits == 8:
        return codes
    pieces = codes.chunk(8 // bits, -1)
    packed = pieces[0].clone()
    for i, piece in enumerate(pieces[1:], 1):
        packed |= piece << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes `[..., D]` (uint8) that `pack` packed."""
    if bits == 8:
        return packed
    return torch.cat([(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], -1)


def _grouped(x: Tensor, codec: Codec) -> Tensor:
    """`[..., n, D]` with the entries that share a scale along -2 (channel) or -1 (token)."""
    if codec.axis == "channel":
        return torch.unflatten(x, -2, (-1, codec.group))
    return torch.unflatten(x, -1, (-1, codec.group or x.shape[-1]))


def _stacked(codec: Codec, *numbers: Tensor) -> Tensor:
    if codec.axis == "channel":
        return torch.cat(numbers, -2)
    return torch.stack([x.squeeze(-1) for x in numbers], -2)


def _never_zero(scale: Tensor) -> Tensor:
    wide = scale.float()
    return torch.where(wide > 0, wide, torch.ones_like(wide))
