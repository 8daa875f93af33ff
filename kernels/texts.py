"""The texts of generated kernels, for reading: what a route compiles for a spec, one file for each kernel."""

from __future__ import annotations

import torch

from kvcompile.kernels.compact import CompactSpec
from kvcompile.kernels.cpp import backend, compact, encode, simd
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.triton import tuning
from kvcompile.kernels.triton.compact import Compaction
from kvcompile.kernels.triton.emit import Kernels
from kvcompile.plan.storage import Codec

VECTORS = "simd.h"
SPLIT = (("", 1), ("-split", 2))  # ends of names of kernels whose rows one program reads, or several


def texts(route: str, spec: KernelSpec, dtype: str, device: str = "") -> dict[str, str]:
    """Each kernel that attention over a spec may run on a route, by the end of its file's name; none of a library.

    dtype: of the queries; device: name of the GPU, whose measured tiles are taken where there are some.
    """
    if route == "cpp":
        return _cpp(spec, getattr(torch, dtype))
    if route == "triton":
        return _triton(spec, device)
    return {}


def window(route: str, spec: KernelSpec, dtype: str, device: str = "") -> dict[str, str]:
    """Kernels that add up attention of the last queries over a spec with scores on a route, named as in `texts`."""
    if route == "cpp" and backend.describe(spec, getattr(torch, dtype)) == "cpp":
        return {"window.cpp": _including(backend.source(spec, getattr(torch, dtype), many=True, values=False))}
    if route == "triton":
        choice = tuning.choose(device, spec, "many")
        return {f"window{end}.py": Kernels(spec, tuning.form(choice, "many", n, "lse")).text for end, n in SPLIT}
    return {}


def encoder(route: str, codec: Codec, dim: int, dtype: str) -> str | None:
    """The kernel that encodes vectors of `dim` channels on a route; None where a library does it."""
    if route != "cpp" or not codec.scaled or getattr(torch, dtype) not in encode.TYPES:
        return None
    return _including(encode.source(codec, dim, dtype))


def compaction(route: str, spec: CompactSpec) -> dict[str, str]:
    """The kernel that moves kept entries on a route, by its file's name; none of a library."""
    if route == "cpp":
        return {f"compact-{spec.name}.cpp": compact.source(spec)}
    return {f"compact-{spec.name}.py": Compaction(spec).text} if route == "triton" else {}


def shared(route: str) -> dict[str, str]:
    """What the files of a route include, by name."""
    return {VECTORS: simd.prelude()} if route == "cpp" else {}


def _cpp(spec: KernelSpec, dtype: torch.dtype) -> dict[str, str]:
    if backend.describe(spec, dtype) != "cpp":
        return {}
    sources = {"step": backend.source(spec, dtype), "chunk": backend.source(spec, dtype, many=True)}
    return {f"{name}.cpp": _including(text) for name, text in sources.items()}


def _including(text: str) -> str:
    """With a line in place of the vectors, which are in front of the text when it is compiled."""
    return f'#include "{VECTORS}"\n\n{text}'


def _triton(spec: KernelSpec, device: str) -> dict[str, str]:
    found = {}
    for tokens in ("one", "many"):
        choice = tuning.choose(device, spec, tokens)
        for end, count in SPLIT:
            found[f"{tokens}{end}.py"] = Kernels(spec, tuning.form(choice, tokens, count)).text
    return found
