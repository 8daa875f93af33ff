"""Which positions a layer sees that does not see all: those of a sliding window, or of a chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Positions = TypeVar("Positions", int, "Tensor")


def oldest(at: Positions, window: int, chunked: bool = False) -> Positions:
    """The first position that a query at `at` sees: of its newest `window`, or of its chunk of so many."""
    return at // window * window if chunked else at - window + 1
