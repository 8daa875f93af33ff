"""The one place where a kernel route is chosen; the choice can be forced and is always reported."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels import codecs, compact, reference, sdpa
from kvcompile.kernels.cpp import backend as cpp
from kvcompile.kernels.cpp import build, encode
from kvcompile.kernels.cpp import compact as cpp_compact
from kvcompile.kernels.layout import Queries, View
from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.kernels.triton import backend as triton


class Route(Protocol):
    """A way to compute attention: the contract of `reference.attend`."""

    def __call__(self, queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
        """Attention `[B, H_q, Q, D_v]`; column sums are added to `sums` where the spec has `scores`."""
        ...


class ColumnSumKernel(Protocol):
    """A way to add up what entries receive from the last queries of a prefill, with no values read."""

    def __call__(self, queries: Queries, view: View, spec: KernelSpec, sums: Tensor) -> None:
        """Column sums of all `queries`, causal by true positions, are added to `sums [R, longest row]`."""
        ...


ROUTES: dict[str, Route] = {
    "cpp": cpp.attend,
    "triton": triton.attend,
    "sdpa": sdpa.attend,
    "reference": reference.attend,
}
WINDOWS: dict[str, ColumnSumKernel] = {"cpp": cpp.window_sums, "triton": triton.window_sums}
ENCODERS: dict[str, codecs.Encoder] = {"cpp": encode.encode}  # the other routes encode with torch
COMPACTORS: dict[str, compact.Compactor] = {"cpp": cpp_compact.compact, "triton": triton.compact}  # the others: torch
GENERATED = {"cpu": "cpp"}  # the generated kernels of each type of device: what `auto` means where they run


def choose(requested: str, device: torch.device | str = "cpu") -> str:
    """The route that `kernels=<requested>` means on a device: `auto` is the fastest one that runs there.

    Raises KvcompileError for a name that is none, and for generated kernels that cannot run there.
    """
    place = torch.device(device).type
    if requested == "auto":
        return "sdpa" if why(device) else GENERATED[place]
    if requested not in ROUTES:
        raise KvcompileError(f"kernels must be one of auto, {', '.join(ROUTES)}", repr(requested))
    if requested == "cpp":
        if place != "cpu":
            raise KvcompileError("kernels=cpp runs on a CPU", f"a model on {place}", "set kernels=auto")
        build.toolchain()
    if requested == "triton":
        triton.ready(place)
    return requested


def differentiable(route: str) -> Route:
    """What attends in place of a route where gradients are wanted: generated kernels have none."""
    return sdpa.attend if route in ("cpp", "triton") else ROUTES[route]


def encoder(route: str) -> codecs.Encoder:
    """What turns keys and values into codes where a route attends; the codes are the same on every route."""
    return ENCODERS.get(route, codecs.encode)


def compactor(route: str) -> compact.Compactor:
    """What moves the entries that a selection keeps where a route attends; the bytes are the same on every route."""
    return COMPACTORS.get(route, compact.compact)


def why(device: torch.device | str = "cpu") -> str:
    """Why `kernels=auto` falls back to the library on a device; empty where it does not."""
    place = torch.device(device).type
    if place == "cuda":  # compiled ahead of time and interpreted, but measured on no GPU yet
        return "kernels=triton has to be asked for"
    if place not in GENERATED:
        return f"no kernels are generated for {place}"
    return build.available() or ""


def scores(route: str, parts: tuple[Part, ...], dtype: object) -> bool:
    """Whether a route computes column sums over these parts for queries of a dtype (or its name)."""
    return cpp.generated(parts, str(dtype).removeprefix("torch.")) if route == "cpp" else route != "sdpa"


def window_sums(route: str, parts: tuple[Part, ...], dtype: object) -> ColumnSumKernel | None:
    """What adds up, on a route, the attention that entries in these parts receive from the last queries of a prefill.

    None: no kernel does; a score looks at queries and keys itself.
    """
    return WINDOWS.get(route) if scores(route, parts, dtype) else None


def describe(route: str, spec: KernelSpec, dtype: torch.dtype) -> str:
    """What runs on a route to decode with queries of a dtype: the route, or whom it hands this to and why."""
    return cpp.describe(spec, dtype) if route == "cpp" else route
