"""The operator `kvcompile_triton::attend`: one node in every graph, whatever runs behind it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.kernels.triton.launch import Call, attend
from kvcompile.plan.storage import Codec

SCHEMA = (
    "attend(Tensor queries, Tensor at, Tensor[] arrays, Tensor(a!)? sums, str spec, SymInt[] longest, "
    "Tensor? sinks=None) -> Tensor"
)


@cache
def read(text: str) -> KernelSpec:
    """The spec that `backend.written` wrote."""
    head, *pieces = text.split(";")
    group, head_dim, value_dim, scale, window, softcap, scores, latent, sink = head.split()
    parts = []
    for piece in pieces:
        layout, page, *codecs = piece.split()
        key, value = (Codec(k, axis, int(g)) for k, axis, g in (codecs[:3], codecs[3:]))  # type: ignore[arg-type]
        parts.append(Part(layout, key, value, int(page)))
    return KernelSpec(
        tuple(parts),
        int(group),
        int(head_dim),
        int(value_dim),
        float(scale),
        int(window) or None,
        float(softcap) or None,
        scores == "True",
        latent == "True",
        sink == "True",
    )


def _attend(
    queries: Tensor,
    at: Tensor,
    arrays: list[Tensor],
    sums: Tensor | None,
    spec: str,
    longest: list[int],
    sinks: Tensor | None = None,
) -> Tensor:
    return attend(Call(read(spec), queries, at, arrays, longest, sinks), sums)


def _fake(
    queries: Tensor,
    at: Tensor,
    arrays: list[Tensor],
    sums: Tensor | None,
    spec: str,
    longest: list[int],
    sinks: Tensor | None = None,
) -> Tensor:
    return queries.new_empty(*queries.shape[:3], read(spec).value_dim)


_library: Any = torch.library.Library("kvcompile_triton", "DEF")  # type: ignore[no-untyped-call]
_library.define(SCHEMA)
_library.impl("attend", _attend, "CUDA")
_library.impl("attend", _attend, "CPU")  # the interpreter; the backend refuses other calls
torch.library.register_fake("kvcompile_triton::attend", _fake, lib=_library)
