"""Number formats in plain PyTorch: what every kernel that reads or writes stored codes is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.plan.storage import Codec

Encoder = Callable[[Tensor, Codec], tuple[Tensor, Tensor | None]]  # the contract of `encode`


def dtype_of(codec: Codec) -> torch.dtype:
    """What stored elements are. Raises KvcompileError for a format that there is not."""
    dtype = getattr(torch, codec.format.dtype, None)
    if not isinstance(dtype, torch.dtype) or 8 * dtype.itemsize != max(8, codec.bits):
        raise KvcompileError(
            f"number format {codec.kind}: elements must be a torch dtype of the size of its codes",
            f"{codec.bits} bits in {codec.format.dtype}",
        )
    return dtype


def encode(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor | None]:
    """Codes `[..., n, W]` and scales (see `layout`) of `x [..., n, D]`, as the codec's `NumberFormat` makes them."""
    dtype = dtype_of(codec)
    if not codec.scaled:
        return x.to(dtype), None
    codes, parameters = codec.format.encode(_grouped(x.float(), codec), -2 if codec.axis == "channel" else -1)
    return pack(codes.reshape(x.shape).to(dtype), codec.bits), _stacked(codec, *parameters)


def decode(codes: Tensor, scales: Tensor | None, codec: Codec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers `[..., n, D]` from what `encode` gave.

    Args:
        codes: `[..., n, W]`, packed where they have fewer than 8 bits.
        scales: as `kvcompile.kernels.layout` says; None for a format without them.
        codec: the one that encoded them.
        dtype: in which it is computed, and of what comes out.
    """
    if scales is None:
        return codes.to(dtype)
    whole = unpack(codes, codec.bits)
    numbers = scales.to(dtype)
    # channel: [..., n/g, 1, D] against [..., n/g, g, D]; token: [..., n, D/g, 1] against [..., n, D/g, g]
    split = torch.split(numbers if codec.axis == "channel" else numbers.unsqueeze(-1).transpose(-3, -2), 1, -2)
    split = split if codec.axis == "channel" else tuple(x.squeeze(-2) for x in split)
    return codec.format.decode(_grouped(whole, codec), *split).reshape(whole.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., D]` (uint8) below 8 bits into `[..., D * bits / 8]` bytes, split-part."""
    if bits >= 8:
        return codes
    pieces = codes.chunk(8 // bits, -1)
    packed = pieces[0].clone()
    for i, piece in enumerate(pieces[1:], 1):
        packed |= piece << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes `[..., D]` (uint8) that `pack` packed."""
    if bits >= 8:
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
