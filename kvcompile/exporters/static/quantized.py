"""Rows whose older entries are encoded, in fixed shapes: codes, and a residual in the model's dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.exporters.static.capacity import Room
from kvcompile.exporters.static.selection import Entries
from kvcompile.kernels.codecs import decode, encode
from kvcompile.plan.storage import Codec
from kvcompile.stores.encoded.codes import Format, step

SIDES = ("key", "value")


def format_of(room: Room, dtype: torch.dtype) -> Format:
    """The number formats of a layer that decodes to `dtype`."""
    return Format(*room.plan.storage.codecs(str(dtype).removeprefix("torch.")), dtype)


def codes_of(entries: Entries, format: Format) -> dict[str, Tensor]:
    """Encoded entries `[B, H_kv, n, ...]`, n a multiple of the format's block, by the names they have in a state."""
    state = {}
    for side, codec, numbers in zip(SIDES, (format.key, format.value), (entries.keys, entries.values), strict=True):
        codes, scales = encode(numbers, codec)
        state[f"{side}_codes"] = codes
        if scales is not None:
            state[f"{side}_scales"] = scales
    return {**state, "code_positions": entries.positions}


def encoded(room: Room, counts: Tensor) -> Tensor:
    """How many of `counts` entries are encoded in a flushed row: `Storage.encoded` of tensors."""
    block = room.plan.storage.block
    return (counts - room.plan.storage.residual).clamp(min=0) // block * block


def split(room: Room, entries: Entries, order: Tensor, counts: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The entries `order [B, H_kv, m]`, the first `counts [B, H_kv]` of which are there, as (codes, residual, encoded).

    residual `[B, H_kv, capacity]` are places in `entries`; `encoded [B, H_kv]` is how many entries lie in the codes.
    """
    n, old = entries.positions.shape[-1], encoded(room, counts)
    longest = room.codes + room.plan.storage.block
    padded = F.pad(order, (0, longest + room.capacity))
    place = torch.arange(padded.shape[-1], device=order.device, dtype=torch.int64).expand_as(padded)
    there = place < counts.unsqueeze(-1)
    inside = torch.where(place < old.unsqueeze(-1), padded, n)[..., :longest]
    later = place[..., : room.capacity] + old.unsqueeze(-1)
    residual = torch.where(there, padded, n).gather(-1, later)
    return codes_of(entries.at(inside), format_of(room, entries.keys.dtype)), residual, old


def entries_of(room: Room, codes: Mapping[str, Tensor], residual: Entries) -> Entries:
    """Codes and residual as plain rows: the codes decoded, without their spare block."""
    format, n = format_of(room, residual.keys.dtype), room.codes
    if not n:
        return residual
    plain = []
    for side, codec, newest in zip(SIDES, (format.key, format.value), (residual.keys, residual.values), strict=True):
        scales = codes.get(f"{side}_scales")
        scales = None if scales is None else scales[:, :, : n // step(codec)]
        old = decode(codes[f"{side}_codes"][:, :, :n], scales, codec, residual.keys.dtype)
        plain.append(torch.cat((old, newest), 2))
    return Entries(plain[0], plain[1], torch.cat((codes["code_positions"][:, :, :n], residual.positions), 2))


def flush(room: Room, codes: Mapping[str, Tensor], residual: Entries, counts: Tensor) -> None:
    """Write the residual's first `counts [B, H_kv]` entries to the end of the codes, in place.

    What is not to be written goes to the spare block behind the codes, which nothing reads.
    """
    storage = room.plan.storage
    most = storage.encoded(room.capacity)
    format, block = format_of(room, residual.keys.dtype), storage.block
    oldest = Entries(residual.keys[:, :, :most], residual.values[:, :, :most], residual.positions[:, :, :most])
    j = torch.arange(most, device=counts.device, dtype=torch.int64)
    end = codes["encoded"].unsqueeze(-1) + j
    end = end + block * (end >= room.codes)  # past the spare block too: what does not fit is an error
    place = torch.where(j < counts.unsqueeze(-1), end, room.codes + j % block)
    batch, heads = counts.shape
    rows = (
        torch.arange(batch, device=counts.device, dtype=torch.int64).view(-1, 1, 1),
        torch.arange(heads, device=counts.device, dtype=torch.int64).view(-1, 1),
    )
    for name, new in codes_of(oldest, format).items():
        every = step(_codec(format, name)) if name.endswith("_scales") else 1
        codes[name].index_put_((*rows, place[..., ::every] // every), new)
    codes["encoded"].add_(counts)


def _codec(format: Format, name: str) -> Codec:
    return format.key if name.startswith("key") else format.value
