"""Which compactions a layer's store may run, known from its plan alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvcompile.kernels.compact import Arrays, CompactSpec
from kvcompile.plan.plan import LayerPlan
from kvcompile.stores.base import POSITION_TYPE
from kvcompile.stores.encoded.codes import Codes, Format

Entries = tuple[tuple[int, int], ...]
GATHERED = (("dense", "dense"), ("dense", "ragged"), ("ragged", "ragged"))  # as rows have one length or not


def expected(layer: LayerPlan, dtype: str) -> list[CompactSpec]:
    """What moves into pages, when a selection or a window drops entries, and when old ones are encoded."""
    storage, drops = layer.storage, layer.selection is not None or bool(layer.sliding_window)
    pages = f"paged{storage.page}"
    if storage.low is not None:
        codecs = (storage.codecs(dtype), storage.low)
        tiers = (replace(layer, storage=replace(storage, key=key, value=value)) for key, value in codecs)
        return [CompactSpec("ragged", "ragged", _entries(tier, dtype)[1]) for tier in tiers]
    plain, quantized = _entries(layer, dtype)
    gathered = [CompactSpec(*way, plain) for way in GATHERED]
    if not storage.quantized and storage.page:
        return [CompactSpec("dense", pages, plain), *[CompactSpec(pages, pages, plain, in_place=True)] * drops]
    if not storage.quantized:
        return gathered * drops
    specs = [*gathered, CompactSpec("ragged", "ragged", plain, in_place=True)]
    specs.append(CompactSpec("ragged", pages if storage.page else "ragged", quantized))
    return [*specs, CompactSpec(pages, pages, quantized, in_place=True)] if drops and storage.page else specs


def _entries(layer: LayerPlan, dtype: str) -> tuple[Entries, Entries]:
    """Bytes and tokens of an entry of each array: in the model's type, and in the number formats of the storage."""
    kind: torch.dtype = getattr(torch, dtype)
    latent = layer.latent.rope if layer.latent else None
    format = Format(*layer.storage.codecs(dtype), kind, latent=latent)
    start = torch.zeros(1, dtype=torch.long, device="cpu")
    keys, values = (
        torch.zeros(format.block, dim, dtype=kind, device="cpu") for dim in (layer.key_dim, layer.value_dim)
    )
    positions = torch.zeros(format.block, dtype=POSITION_TYPE, device="cpu")
    own = (keys, positions) if layer.latent is not None else (keys, values, positions)
    quantized = (
        Codes.of(keys, values, positions, format).arrays(start, format).entries if layer.storage.quantized else ()
    )
    return Arrays(own, starts=start).entries, quantized
