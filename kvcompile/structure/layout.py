"""The projections of an attention layer by head, whatever modules its family keeps them in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.base import Absent, Attention
from kvcompile.adapters.families import Fused, HeadNormed, Interleaved, Separate, WidthNormed
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import LayerPlan


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
    """The weights of one layer: projections by head, `out [hidden, H, D]`, and `head_norm [D]`, shared by key heads.

    `key` and `value` are None for a layer that reads another layer's cache.
    """

    query: Projection
    key: Projection | None
    value: Projection | None
    out: Tensor
    head_norm: Tensor | None = None

    @property
    def own(self) -> tuple[Projection, Projection]:
        """Keys and values of a layer with a cache of its own. Raises ValueError for another."""
        if self.key is None or self.value is None:
            raise ValueError("the layer has no keys and values of its own")
        return self.key, self.value


@dataclass(frozen=True)
class Layout:
    """Reads and writes `Weights` of one family. `heads` and `dim` are those of the original layer.

    `write` gives new modules by name (None: as it was is right); it changes nothing.
    """

    out: ClassVar[str] = "o_proj"
    attention: nn.Module
    heads: int
    kv_heads: int
    dim: int

    def read(self) -> Weights:
        """The weights, as views."""
        raise NotImplementedError

    def write(self, new: Weights) -> dict[str, nn.Module]:
        """Modules that hold `new`."""
        raise NotImplementedError

    def _rows(self, name: str, heads: int) -> Projection:
        linear = plain(self.attention, name)
        weight, bias = linear.weight.detach(), linear.bias
        return Projection(
            weight.view(heads, -1, weight.shape[1]), None if bias is None else bias.detach().view(heads, -1)
        )

    def _out(self) -> Tensor:
        weight = plain(self.attention, self.out).weight.detach()
        return weight.view(weight.shape[0], self.heads, self.dim)

    def _write_out(self, new: Weights) -> dict[str, nn.Module]:
        old = plain(self.attention, self.out)
        return {self.out: linear_like(old, new.out.flatten(1), old.bias)}


@dataclass(frozen=True)
class SeparateLayout(Layout):
    """Three projections; norms of single heads have no rows of their own."""

    def read(self) -> Weights:
        """As views."""
        norm = self._norm("k_norm")
        return Weights(
            self._rows("q_proj", self.heads),
            self._rows("k_proj", self.kv_heads),
            self._rows("v_proj", self.kv_heads),
            self._out(),
            norm,
        )

    def write(self, new: Weights) -> dict[str, nn.Module]:
        """New q, k, v and o projections, and the key norm if its weight is another."""
        made = self._write_out(new)
        for name, part in (("q_proj", new.query), ("k_proj", new.key), ("v_proj", new.value)):
            made[name] = Absent() if part is None else linear_of(plain(self.attention, name), [part])
        if hasattr(self.attention, "k_norm"):
            if new.key is None:
                made["k_norm"] = Absent()
            elif new.head_norm is not None:
                made["k_norm"] = norm_of(self.attention.get_submodule("k_norm"), new.head_norm)
        return made

    def _norm(self, name: str) -> Tensor | None:
        norm = getattr(self.attention, name, None)
        return None if norm is None else norm.weight.detach()


@dataclass(frozen=True)
class WidthNormedLayout(SeparateLayout):
    """Three projections, queries and keys normed over all heads at once: a norm weight belongs to each row."""

    def read(self) -> Weights:
        """As views."""
        found = super().read()
        for part, name, heads in ((found.query, "q_norm", self.heads), (found.key, "k_norm", self.kv_heads)):
            weight = self._norm(name)
            if part is not None and weight is not None:
                part.norm = weight.view(heads, -1)
        found.head_norm = None
        return found

    def write(self, new: Weights) -> dict[str, nn.Module]:
        """New projections, and norms as wide as they are."""
        made = super().write(new)
        for part, name in ((new.query, "q_norm"), (new.key, "k_norm")):
            if part is not None and part.norm is not None:
                made[name] = norm_of(getattr(self.attention, name), part.norm.flatten())
        return made


@dataclass(frozen=True)
class FusedLayout(Layout):
    """One projection: all query heads, all key heads, all value heads."""

    name: ClassVar[str] = "qkv_proj"

    def read(self) -> Weights:
        """As views."""
        rows = self._rows(self.name, self.heads + 2 * self.kv_heads)
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        weights = torch.split(rows.weight, sizes)
        biases: Sequence[Tensor | None] = [None] * 3 if rows.bias is None else torch.split(rows.bias, sizes)
        query, key, value = (Projection(w, b) for w, b in zip(weights, biases, strict=True))
        return Weights(query, key, value, self._out())

    def write(self, new: Weights) -> dict[str, nn.Module]:
        """One new projection; of queries alone where the layer reads another layer's cache."""
        parts = [part for part in (new.query, new.key, new.value) if part is not None]
        return {**self._write_out(new), self.name: linear_of(plain(self.attention, self.name), parts)}


@dataclass(frozen=True)
class InterleavedLayout(Layout):
    """One projection: per KV head its queries, its key, its value."""

    out: ClassVar[str] = "dense"
    name: ClassVar[str] = "query_key_value"

    def read(self) -> Weights:
        """As views of the cut rows."""
        group, hidden = self.heads // self.kv_heads, plain(self.attention, self.name).weight.shape[1]
        rows = self._rows(self.name, self.kv_heads)  # [H_kv, (g + 2) D, hidden]

        def cut(x: Tensor | None, at: slice, *shape: int) -> Tensor | None:
            return None if x is None else torch.unflatten(x, 1, (group + 2, self.dim))[:, at].reshape(shape)

        places = (
            (slice(0, group), self.heads),
            (slice(group, group + 1), self.kv_heads),
            (slice(group + 1, None), self.kv_heads),
        )
        parts = []
        for at, heads in places:
            weight = cut(rows.weight, at, heads, self.dim, hidden)
            if weight is not None:
                parts.append(Projection(weight, cut(rows.bias, at, heads, self.dim)))
        return Weights(parts[0], parts[1], parts[2], self._out())

    def write(self, new: Weights) -> dict[str, nn.Module]:
        """One new projection; of queries alone where the layer reads another layer's cache."""
        made = self._write_out(new)
        old = plain(self.attention, self.name)
        if new.key is None or new.value is None:
            return {**made, self.name: linear_of(old, [new.query])}
        kv_heads = new.key.weight.shape[0]

        def woven(*parts: Tensor) -> Tensor:
            return torch.cat([torch.unflatten(x, 0, (kv_heads, -1)).flatten(1, 2) for x in parts], 1)

        weight = woven(new.query.weight, new.key.weight, new.value.weight)
        bias = None
        if new.query.bias is not None and new.key.bias is not None and new.value.bias is not None:
            bias = woven(new.query.bias, new.key.bias, new.value.bias)
        return {**made, self.name: linear_of(old, [Projection(weight, bias)])}


LAYOUTS: dict[type[Attention], Callable[..., Layout]] = {
    Separate: SeparateLayout,
    HeadNormed: SeparateLayout,
    WidthNormed: WidthNormedLayout,
    Fused: FusedLayout,
    Interleaved: InterleavedLayout,
}


def precise(x: Tensor) -> Tensor:
    """In float64, which Apple's GPUs have not."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def plain(attention: nn.Module, name: str) -> nn.Linear:
    """The projection called `name`. Raises KvcompileError for one that is no plain `nn.Linear` (quantised, LoRA)."""
    linear = getattr(attention, name)
    weight = linear.weight
    if type(linear) is not nn.Linear or type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise KvcompileError(
            f"{name} must be a plain nn.Linear to be converted",
            f"{type(linear).__name__} with {type(weight).__name__} of {weight.dtype}",
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


def layout_of(model: Any, attention: nn.Module, p: LayerPlan) -> Layout:
    """The projections of one attention of an uncompiled model. Raises KvcompileError for families without a layout."""
    from kvcompile.adapters.architectures import architecture_of

    adapter = architecture_of(model.config).adapter
    if adapter not in LAYOUTS:
        known = ", ".join(sorted(cls.__name__ for cls in LAYOUTS))
        raise KvcompileError(
            "weights can be converted only in layouts that are known", adapter.__name__, f"attention like {known}"
        )
    return LAYOUTS[adapter](attention, p.query_heads, p.dense_heads, p.head_dim)
