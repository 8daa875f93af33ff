"""The dtype in which weights are edited."""

from __future__ import annotations

from torch import Tensor


def precise(x: Tensor) -> Tensor:
    """In float64, which Apple's GPUs have not."""
    return (x.cpu() if x.device.type == "mps" else x).double()
