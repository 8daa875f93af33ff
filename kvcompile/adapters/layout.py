"""The projections of an attention layer by head, whatever modules its family keeps them in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvcompile.errors import KvcompileError


@dataclass
class Projection:
    """Rows by head: weight `[H, D, hidden]`, bias and the weight of a norm over all heads `[H, D]` (None: none)."""

    weight: Tensor
    bias: Tensor | None = None
    norm: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Projection:
        """With `change` applied to each tensor along its first dimension (heads)."""
        return Projection(*(None if t is None else change(t) for t in (self.weight, self.bias, self.norm)))  # type: ignore[arg-type]

    def turn(self, rotations: Tensor) -> Projection:
        """Each head's rows rotated by `rotations [H, D, D]`: x' = R x. A norm over all heads cannot be turned."""
        if self.norm is not None:
            raise ValueError("rows under a norm cannot be rotated")

        def turned(x: Tensor) -> Tensor:
            rows = x.unsqueeze(-1) if x.dim() == 2 else x
            return (rotations @ rows.to(rotations)).to(x).view_as(x)

        return self.map(turned)


@dataclass
class Weights:
    """The weights of one layer: projections by head, `out [hidden, H, D]`, `head_norm [D]`, shared by key heads, and
    `sinks [H]`, a learned logit of each query head.

    `key` and `value` are None for a layer that reads another layer's cache.
    """

    query: Projection
    key: Projection | None
    value: Projection | None
    out: Tensor
    head_norm: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def own(self) -> tuple[Projection, Projection]:
        """Keys and values of a layer with a cache of its own. Raises ValueError for another."""
        if self.key is None or self.value is None:
            raise ValueError("the layer has no keys and values of its own")
        return self.key, self.value


@dataclass(frozen=True)
class Layout:
    """Reads and writes the `Weights` of one attention module, whose output projection is called `out`.

    `heads`, `kv_heads` and `dim` (of a head) are those of the layer before it is converted.
    """

    attention: nn.Module
    heads: int
    kv_heads: int
    dim: int
    out: str = "o_proj"

    def read(self) -> Weights:
        """The weights, as views."""
        raise NotImplementedError

    def write(self, new: Weights) -> dict[str, nn.Module]:
        """New modules by name that hold `new`; the attention itself is left as it is."""
        raise NotImplementedError

    def learned(self, new: Weights) -> dict[str, nn.Parameter]:
        """New parameters of the attention itself, by name, that hold `new`; most have none."""
        return {}

    def rows(self, name: str, heads: int) -> Projection:
        """The projection called `name`, of so many heads."""
        linear = plain(self.attention, name)
        weight, bias = linear.weight.detach(), linear.bias
        return Projection(
            weight.view(heads, -1, weight.shape[1]), None if bias is None else bias.detach().view(heads, -1)
        )

    def output(self) -> Tensor:
        """Weight of the output projection, `[hidden, H, D]`."""
        weight = plain(self.attention, self.out).weight.detach()
        return weight.view(weight.shape[0], self.heads, self.dim)

    def write_output(self, new: Weights) -> dict[str, nn.Module]:
        """The output projection with `new.out`."""
        old = plain(self.attention, self.out)
        return {self.out: linear_like(old, new.out.flatten(1), old.bias)}


def plain(attention: nn.Module, name: str) -> nn.Linear:
    """The projection called `name`. Raises KvcompileError for one that is no plain `nn.Linear` (quantised, LoRA)."""
    linear = getattr(attention, name)
    weight = getattr(linear, "weight", None)
    if type(linear) is not nn.Linear or type(weight) is not nn.Parameter or not weight.is_floating_point():
        stored = (
            f" with {type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else " of packed weights"
        )
        raise KvcompileError(
            f"{name} must be a plain nn.Linear to be converted",
            type(linear).__name__ + stored,
            "merge adapters and load unquantised weights first",
        )
    return linear


def linear_of(old: nn.Linear, parts: Sequence[Projection]) -> nn.Linear:
    """A Linear whose rows are those of `parts`, in order; all else as in `old`."""
    biases = [part.bias.flatten() for part in parts if part.bias is not None]
    rows = [part.weight.flatten(0, 1) for part in parts]
    weight = rows[0] if len(rows) == 1 else torch.cat(rows)  # one part may be a view of what is there already
    return linear_like(old, weight, torch.cat(biases) if biases else None)


def linear_like(old: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """`old` itself if it holds just these tensors, else a new Linear with copies of them."""
    if weight.data_ptr() == old.weight.data_ptr() and weight.shape == old.weight.shape and not weight.is_meta:
        return old
    rows, columns = weight.shape
    new = nn.Linear(columns, rows, bias is not None, device="meta", dtype=weight.dtype)
    new.weight = nn.Parameter(weight.detach().clone(), old.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), old.weight.requires_grad)
    return new.train(old.training)


def norm_of(old: nn.Module, weight: Tensor) -> nn.Module:
    """A norm like `old` with this weight."""
    new, like = copy.copy(old), old.get_parameter("weight")
    new._parameters = {**old._parameters, "weight": nn.Parameter(weight.detach().clone(), like.requires_grad)}
    return new
