"""What compiled code takes for memory: looked at where its address is taken, as nothing behind a pointer can tell.

Numbers that are stored (borders of rows, tables of pages, kept entries) are the cache's own and are not read here.
`opaque` is where torch.compile stops looking: at what takes addresses of tensors, or whose effects are Python's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError

Sizes = tuple[int, ...]
P = ParamSpec("P")
R = TypeVar("R")


def opaque(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which torch.compile calls as it is. Half a microsecond a call.

    A trace may cut a function in two anywhere: tensors whose addresses it has taken would be gone in the second half.
    """
    hidden: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return hidden


def address(name: str, x: Tensor, dtype: torch.dtype, shape: Sizes, strides: Sizes = ()) -> int:
    """Where a tensor on the CPU lies, if it is what a kernel reads as `name`. Raises KvcompileError otherwise.

    strides: those of the last dimensions; none: the tensor is contiguous.
    """
    if not (x.is_cpu and x.dtype is dtype and x.shape == shape and _lies(x, strides)):
        raise _other(name, x, dtype, shape, strides)
    return x.data_ptr()


def _lies(x: Tensor, strides: Sizes) -> bool:
    if not strides:
        return x.is_contiguous()
    own, count = x.stride(), len(strides)
    if own[-count:] == strides or not x.numel():
        return True
    last = zip(x.shape[-count:], own[-count:], strides, strict=True)
    return all(size == 1 or one == other for size, one, other in last)  # of a dimension of one, any stride will do


def _other(name: str, x: Tensor, dtype: torch.dtype, shape: Sizes, strides: Sizes) -> KvcompileError:
    lies = f"with last strides {list(strides)}" if strides else "contiguous"
    return KvcompileError(
        f"a kernel reads {name} as {str(dtype).removeprefix('torch.')} {list(shape)}, {lies}",
        f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} with strides {list(x.stride())} on {x.device}",
    )
