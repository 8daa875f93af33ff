"""The one place where a backend is chosen; the choice can be forced and is always reported."""

from __future__ import annotations

import functools

import torch

from kvcompile.errors import FOREIGN, KvcompileError, shortened
from kvcompile.kernels import reference, sdpa
from kvcompile.kernels.backend import Backend
from kvcompile.kernels.cpp import build
from kvcompile.kernels.cpp.backend import CPP
from kvcompile.kernels.names import GROUP, names
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.triton.backend import TRITON
from kvcompile.plan.extensions import with_extensions

SDPA = Backend("sdpa", sdpa.attend, supports=sdpa.supports, differentiable=True, library_prompts=True)
REFERENCE = Backend("reference", reference.attend, differentiable=True)
BUILT_IN = (CPP, TRITON, SDPA, REFERENCE)


@functools.cache
def backends() -> dict[str, Backend]:
    """All installed backends by name: ours, then those of other packages.

    Raises KvcompileError if an entry point cannot be loaded, is no Backend of its name, or takes a name that is taken.
    """
    ours = {backend.name: backend for backend in BUILT_IN}
    return with_extensions(
        GROUP, "backend", ours, "a Backend", lambda x, name: isinstance(x, Backend) and x.name == name
    )


def named(name: str) -> Backend:
    """The backend of a name. Raises KvcompileError with the list of all for a name that is none."""
    backend = {backend.name: backend for backend in BUILT_IN}.get(name) or backends().get(name)
    if backend is None:
        raise KvcompileError(f"kernels must be one of auto, {', '.join(names())}", shortened(repr(name), FOREIGN))
    return backend


def choose(requested: str, device: torch.device | str = "cpu") -> Backend:
    """The backend that `kernels=<requested>` means on a device: `auto` is the fastest of ours that runs there.

    Raises KvcompileError for a name that is none, and for a backend that cannot run there.
    """
    if requested == "auto":
        return SDPA if why(device) else CPP
    backend = named(requested)
    backend.ready(torch.device(device))
    return backend


def why(device: torch.device | str = "cpu") -> str:
    """Why `kernels=auto` falls back to the library on a device; empty where it does not."""
    place = torch.device(device).type
    if place == "cuda":  # compiled ahead of time and interpreted, but measured on no GPU yet
        return "kernels=triton has to be asked for"
    if place != "cpu":
        return f"no kernels are generated for {place}"
    return build.available() or ""


def serving(backend: Backend, spec: KernelSpec, dtype: torch.dtype, gradients: bool = False) -> Backend:
    """Who attends over a spec where a backend was chosen: that one, or the library where it cannot, or the reference.

    gradients: whether they must pass.
    """
    for each in (backend, SDPA):
        if each.supports(spec, dtype) and (each.differentiable or not gradients):
            return each
    return REFERENCE


def describe(backend: Backend, spec: KernelSpec, dtype: torch.dtype) -> str:
    """What attends over a spec for queries of a dtype: the backend, or who does in its place."""
    served = serving(backend, spec, dtype)
    if served is backend:
        return backend.name
    return f"{served.name} ({backend.name} has no kernel for it in {str(dtype).removeprefix('torch.')})"
