"""A second model over the same weights."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def shared(model: nn.Module) -> Any:
    """A second model over the same weights: modules are copied, parameters and buffers are not."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)
