"""The operator `kvcompile_triton::attend`: one node in every graph, whatever runs behind it."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import torch
from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.kernels.triton.launch import Call, attend
from torch import Tensor

from kvcompile.storage import Codec

SCHEMA = "attend(Tensor queries, Tensor at, Tensor[] held, Tensor(a!)? sums, str spec, SymInt[] longest) -> Tensor"


@cache
def written(spec: KernelSpec) -> str:
    """A spec as text."""
    return json.dumps(dataclasses.asdict(spec))


@cache
def read(text: str) -> KernelSpec:
    """The spec that `written` wrote."""
    fields = json.loads(text)
    codecs = [(Codec(**p.pop("key")), Codec(**p.pop("value")), p) for p in fields.pop("parts")]
    return KernelSpec(tuple(Part(key=k, value=v, **rest) for k, v, rest in codecs), **fields)


def _attend(
    queries: Tensor, at: Tensor, held: list[Tensor], sums: Tensor | None, spec: str, longest: list[int]
) -> Tensor:
    return attend(Call(read(spec), queries, at, held, longest), sums)


def _fake(
    queries: Tensor, at: Tensor, held: list[Tensor], sums: Tensor | None, spec: str, longest: list[int]
) -> Tensor:
    return queries.new_empty(*queries.shape[:3], read(spec).value_dim)


_library: Any = torch.library.Library("kvcompile_triton", "DEF")  # type: ignore[no-untyped-call]
_library.define(SCHEMA)
_library.impl("attend", _attend, "CUDA")
_library.impl("attend", _attend, "CPU")  # the interpreter; the route refuses other calls
torch.library.register_fake("kvcompile_triton::attend", _fake, lib=_library)
