"""Rows that all KV heads of a layer share: how many entries each has follows from the scores, their sum does not."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.exporters.static.capacity import Room
from kvcompile.exporters.static.selection import Entries
from kvcompile.runtime.selection import highest_padded


def split(room: Room, entries: Entries, ranked: Tensor, counts: Tensor) -> tuple[Entries, Tensor]:
    """What stays of the entries `[B, H_kv, n]` with scores `ranked`: one row `[B, 1, C]`, and whose each entry is.

    counts `[B, H_kv]`: entries of each head.
    """
    heads, n = ranked.shape[1:]
    order = highest_padded(ranked, counts, room.capacity)
    first = torch.arange(heads, device=order.device, dtype=torch.int64).unsqueeze(-1) * n
    places = torch.where(order < n, order + first, heads * n).flatten(1).sort(-1).values[:, : room.capacity]
    together = Entries(*(x.flatten(1, 2).unsqueeze(1) for x in (entries.keys, entries.values, entries.positions)))
    return together.at(places.unsqueeze(1)), (places // n).to(torch.int32).unsqueeze(1)


def append(tensors: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """One more entry of every head: `new[name] [B, H_kv]` or `[B, H_kv, D]` go to the end of the row, in place."""
    batch, heads = new["heads"].shape
    place = tensors["entries"] + torch.arange(heads, device=tensors["entries"].device, dtype=torch.int64)
    rows = torch.arange(batch, device=place.device, dtype=torch.int64).unsqueeze(1), torch.zeros_like(place)
    for name, x in new.items():
        tensors[name].index_put_((*rows, place), x)
    tensors["entries"].add_(heads)


def visible(heads: Tensor, there: Tensor, group: int, kv_heads: int) -> Tensor:
    """Which entries of the row each query head sees, `[B, 1, H_q, C]`: of `there [B, 1, C]` those of its KV head."""
    asking = torch.arange(kv_heads, device=heads.device, dtype=torch.int64).repeat_interleave(group).unsqueeze(-1)
    return ((heads == asking) & there).unsqueeze(1)
