"""Architectures that other packages bring, found by entry points."""

from __future__ import annotations

import functools
from typing import Any

from kvcompile.plan.extensions import with_extensions

GROUP = "kvcompile.architectures"


@functools.cache
def outside() -> dict[str, Any]:
    """What the entry points of the group name, by `model_type`.

    The modules they stand in are imported by this, which is when they make their classes known to transformers.
    Raises KvcompileError if one cannot be loaded, or two have one name.
    """
    return with_extensions(GROUP, "architecture", {})
