"""A backend: one way to attend to a cache, and what goes beside attention where it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from kvcompile.kernels.choose import Chooser, ChooseSpec
from kvcompile.kernels.choose import choose as choose_by_torch
from kvcompile.kernels.codecs import Encoder
from kvcompile.kernels.codecs import encode as encode_by_torch
from kvcompile.kernels.compact import Compactor, CompactSpec
from kvcompile.kernels.compact import compact as compact_by_torch
from kvcompile.kernels.demote import Demoter, DemoteSpec
from kvcompile.kernels.demote import demote as demote_by_torch
from kvcompile.kernels.layers import LayerKernels
from kvcompile.kernels.layout import Queries, View
from kvcompile.kernels.reference.ghost import GhostSpec, Scorer
from kvcompile.kernels.reference.ghost import ghost_scores as ghost_by_torch
from kvcompile.kernels.selfcheck.verdict import Verdict
from kvcompile.kernels.spec import KernelSpec
from kvcompile.plan.storage import Codec


class Attention(Protocol):
    """A way to compute attention: the contract of `reference.attend`."""

    def __call__(self, queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
        """Attention `[B, H_q, Q, D_v]`; column sums are added to `sums` where the spec has `scores`."""
        ...


class ColumnSums(Protocol):
    """A way to add up what entries receive from the last queries of a prefill, with no values read."""

    def __call__(self, queries: Queries, view: View, spec: KernelSpec, sums: Tensor) -> None:
        """Column sums of all `queries`, causal by true positions, are added to `sums [R, longest row]`."""
        ...


class Sources:
    """The kernels that a backend generates, for reading: each text by its file's name, or the end of it. Here none.

    dtype: of the queries or rows, by name. device: name of the GPU, whose measured tiles are taken where there are any.
    """

    def attention(self, spec: KernelSpec, dtype: str, device: str) -> dict[str, str]:
        """Each kernel that attention over a spec may run, by the end of its file's name."""
        return {}

    def column_sums(self, spec: KernelSpec, dtype: str, device: str) -> dict[str, str]:
        """Those that add up attention of the last queries over a spec with scores, named likewise."""
        return {}

    def encode(self, codec: Codec, dim: int, dtype: str) -> dict[str, str]:
        """The kernel that encodes vectors of `dim` channels, by its file's name."""
        return {}

    def compact(self, spec: CompactSpec) -> dict[str, str]:
        """The kernel that moves kept entries, by its file's name."""
        return {}

    def choose(self, spec: ChooseSpec) -> dict[str, str]:
        """The kernel that chooses what a step recalls, by its file's name."""
        return {}

    def demote(self, spec: DemoteSpec) -> dict[str, str]:
        """The kernel that puts a decoded token into its tier, by its file's name."""
        return {}

    def ghost(self, spec: GhostSpec) -> dict[str, str]:
        """The kernel that scores entries by what their own text looks back at, by its file's name."""
        return {}

    def shared(self) -> dict[str, str]:
        """What the other files include, by name."""
        return {}


def anywhere(device: torch.device) -> None:
    """Ready on every device."""


def everything(spec: KernelSpec, dtype: torch.dtype) -> bool:
    """Every spec is supported, for queries of any dtype."""
    return True


@dataclass(frozen=True)
class Backend:
    """What `kernels=<name>` means. Only `attend` must be given: the rest is torch's, or goes without.

    ready: raises KvcompileError where the backend cannot run on a device: nothing installed, no compiler, no GPU.
    supports: whether it attends over a spec for queries of a dtype; the library does where it does not.
    checked: what a check on this device found of its kernel for a spec; None: no kernel of it needs one.
    differentiable: whether gradients pass; the library attends where they are wanted and they do not.
    sees_ahead: whether it honours `Queries.until`; the library attends where that is set and it does not.
    library_prompts: whether a prompt that sees nothing but itself may be left to the library, where that is faster.
    column_sums: None: scores look at queries and keys themselves. encode, compact: to the same bytes as those of torch.
    choose: what a step reads of a layer that recalls; of groups whose scores differ by rounding alone, any.
    demote: what a decoded token does to the tiers of a layer, to the same bytes as that of torch.
    ghost: scores of entries by what their own text looks back at; others than those of torch by rounding alone.
    linear: gives the linear layers of a model forwards that are fast for a token, and says how many there were.
    layers: kernels for what is around the attention of a layer, for decode steps.
    """

    name: str
    attend: Attention
    ready: Callable[[torch.device], None] = anywhere
    supports: Callable[[KernelSpec, torch.dtype], bool] = everything
    checked: Callable[[KernelSpec, torch.dtype], Verdict] | None = None
    differentiable: bool = False
    sees_ahead: bool = False
    library_prompts: bool = False
    column_sums: ColumnSums | None = None
    encode: Encoder = encode_by_torch
    compact: Compactor = compact_by_torch
    choose: Chooser = choose_by_torch
    demote: Demoter = demote_by_torch
    ghost: Scorer = ghost_by_torch
    linear: Callable[[nn.Module], int] | None = None
    layers: LayerKernels | None = None
    sources: Sources = field(default_factory=Sources)

    def takes(self, spec: KernelSpec, dtype: torch.dtype) -> bool:
        """Whether it is to attend over a spec: it has a kernel, and no check on this device speaks against that."""
        return self.supports(spec, dtype) and (self.checked is None or self.checked(spec, dtype).taken)
