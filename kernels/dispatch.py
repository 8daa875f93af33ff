"""The one place where a kernel route is chosen; the choice can be forced and is always reported."""

from __future__ import annotations

from typing import Protocol

from kvcompile.kernels import reference, sdpa
from kvcompile.kernels.layout import Queries, View
from kvcompile.kernels.spec import KernelSpec
from torch import Tensor

from kvcompile.errors import KvcompileError


class Route(Protocol):
    """A way to compute attention: the contract of `reference.attend`."""

    def __call__(self, queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
        """Attention `[B, H_q, Q, D_v]`; column sums are added to `sums` where the spec has `scores`."""
        ...


ROUTES: dict[str, Route] = {"sdpa": sdpa.attend, "reference": reference.attend}


def choose(requested: str) -> str:
    """The route that `kernels=<requested>` means: `auto` is the fastest one that runs here.

    Raises KvcompileError for a name that is none.
    """
    if requested == "auto":
        return "sdpa"
    if requested not in ROUTES:
        raise KvcompileError(f"kernels must be one of auto, {', '.join(ROUTES)}", repr(requested))
    return requested
