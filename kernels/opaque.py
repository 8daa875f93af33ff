"""Where torch.compile stops looking: at a function that takes addresses of tensors, or whose effects are Python's."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def opaque(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which torch.compile calls as it is. Half a microsecond a call.

    A trace may cut a function in two anywhere: tensors whose addresses it has taken would be gone in the second half.
    """
    hidden: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return hidden
