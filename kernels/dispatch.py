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
from kvcompile.kernels.selfcheck.trust import trusted
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.triton.backend import TRITON
from kvcompile.plan.extensions import with_extensions

SDPA = Backend("sdpa", sdpa.attend, supports=sdpa.supports, differentiable=True, sees_ahead=True, library_prompts=True)
REFERENCE = Backend("reference", reference.attend, differentiable=True, sees_ahead=True)
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

    On a GPU that is Triton's, each kernel of which is checked there when it is first needed (`kernels/selfcheck/`).

    Raises KvcompileError for a name that is none, and for a backend that cannot run there.
    """
    place = torch.device(device)
    if requested == "auto":
        if why(place):
            return SDPA
        return CPP if place.type == "cpu" else trusted(TRITON, place)
    backend = named(requested)
    backend.ready(place)
    return backend


def why(device: torch.device | str = "cpu") -> str:
    """Why `kernels=auto` falls back to the library on a device; empty where it does not."""
    place = torch.device(device)
    if place.type == "cuda":
        return _unready(TRITON, place)
    if place.type != "cpu":
        return f"no kernels are generated for {place.type}"
    return build.available() or ""


def _unready(backend: Backend, device: torch.device) -> str:
    """Why a backend cannot run on a device; empty where it can."""
    try:
        backend.ready(device)
    except KvcompileError as error:
        return error.rule
    return ""


def serving(
    backend: Backend, spec: KernelSpec, dtype: torch.dtype, gradients: bool = False, ahead: bool = False
) -> Backend:
    """Who attends over a spec where a backend was chosen: that one, or the library where it cannot, or the reference.

    gradients: whether they must pass. ahead: whether some queries see later tokens.
    """
    for each in (backend, SDPA):
        able = (each.differentiable or not gradients) and (each.sees_ahead or not ahead)
        if able and each.takes(spec, dtype):
            return each
    return REFERENCE


def describe(backend: Backend, spec: KernelSpec, dtype: torch.dtype) -> str:
    """What attends over a spec for queries of a dtype: the backend, or who does in its place."""
    served = serving(backend, spec, dtype)
    if served is backend:
        return backend.name if backend.checked is None else f"{backend.name} ({backend.checked(spec, dtype).reason})"
    if backend.checked is not None and backend.supports(spec, dtype):
        return f"{served.name} ({backend.name}: {backend.checked(spec, dtype).reason})"
    return f"{served.name} ({backend.name} has no kernel for it in {str(dtype).removeprefix('torch.')})"
