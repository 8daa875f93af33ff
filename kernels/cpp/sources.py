"""The texts of generated C++: of what there are kernels, and each as an artifact shows it."""

from __future__ import annotations

import torch

from kvcompile.kernels.backend import Sources
from kvcompile.kernels.choose import ChooseSpec
from kvcompile.kernels.compact import CompactSpec
from kvcompile.kernels.cpp import choose, compact, demote, encode, ghost, simd
from kvcompile.kernels.cpp.emit import decode_kernel, prefill_kernel
from kvcompile.kernels.cpp.emit.stored import emitted
from kvcompile.kernels.demote import DemoteSpec
from kvcompile.kernels.reference.ghost import GhostSpec
from kvcompile.kernels.spec import KernelSpec
from kvcompile.plan.storage import Codec

QUERY_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
VECTORS = "simd.h"


def supports(spec: KernelSpec, dtype: torch.dtype) -> bool:
    """Whether there is a kernel over a spec for queries of a dtype."""
    formats = [codec for part in spec.parts for codec in (part.key, part.value)]
    if spec.latent and any(codec.scaled for codec in formats):
        return False  # values that are channels of codes
    return not (spec.bias or spec.alibi or spec.chunked) and dtype in QUERY_TYPES and all(map(emitted, formats))


def source(spec: KernelSpec, dtype: torch.dtype, many: bool = False, values: bool = True) -> str:
    """Text of the kernel for one new token of each sequence, or for `many`; without the vectors that all share.

    Of many without `values`: column sums alone.
    """
    if many:
        return prefill_kernel.source(spec, QUERY_TYPES[dtype], values)
    return decode_kernel.source(spec, QUERY_TYPES[dtype])


class CppSources(Sources):
    """One file a kernel; the vectors that are in front of each when it is compiled lie beside them."""

    def attention(self, spec: KernelSpec, dtype: str, device: str) -> dict[str, str]:
        """For one new token, and for several."""
        queries = getattr(torch, dtype)
        if not supports(spec, queries):
            return {}
        return {
            "step.cpp": _including(source(spec, queries)),
            "chunk.cpp": _including(source(spec, queries, many=True)),
        }

    def column_sums(self, spec: KernelSpec, dtype: str, device: str) -> dict[str, str]:
        """Of the last queries."""
        queries = getattr(torch, dtype)
        if not supports(spec, queries):
            return {}
        return {"window.cpp": _including(source(spec, queries, many=True, values=False))}

    def encode(self, codec: Codec, dim: int, dtype: str) -> dict[str, str]:
        """Without scales, and of other formats and dtypes, torch encodes."""
        if not codec.scaled or not emitted(codec) or getattr(torch, dtype) not in encode.TYPES:
            return {}
        return {f"encode-{codec.name}-d{dim}.cpp": _including(encode.source(codec, dim, dtype))}

    def compact(self, spec: CompactSpec) -> dict[str, str]:
        """Of any spec."""
        return {f"compact-{spec.name}.cpp": compact.source(spec)}

    def choose(self, spec: ChooseSpec) -> dict[str, str]:
        """In other dtypes than those of queries, torch chooses."""
        if spec.dtype not in QUERY_TYPES.values():
            return {}
        return {f"{spec.name}.cpp": _including(choose.source(spec))}

    def demote(self, spec: DemoteSpec) -> dict[str, str]:
        """In tiers of whole numbers with a scale a token; torch demotes in others."""
        return {f"{spec.name}.cpp": _including(demote.source(spec))} if demote.supports(spec) else {}

    def ghost(self, spec: GhostSpec) -> dict[str, str]:
        """In other dtypes than those of queries, torch scores."""
        return {f"{spec.name}.cpp": _including(ghost.source(spec))} if ghost.supports(spec) else {}

    def shared(self) -> dict[str, str]:
        """The vectors."""
        return {VECTORS: simd.prelude()}


def _including(text: str) -> str:
    """With a line in place of the vectors."""
    return f'#include "{VECTORS}"\n\n{text}'
