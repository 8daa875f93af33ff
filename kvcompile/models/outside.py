"""Architectures that other packages bring, found by entry points."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from typing import Any

from kvcompile.errors import KvcompileError

GROUP = "kvcompile.architectures"


@functools.cache
def outside() -> dict[str, Any]:
    """What the entry points of the group name, by `model_type`.

    The modules they stand in are imported by this, which is when they make their classes known to transformers.
    Raises KvcompileError if one cannot be loaded, or two have one name.
    """
    architectures: dict[str, Any] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        try:
            loaded = entry.load()
        except Exception as error:
            raise KvcompileError(
                f"the architecture {entry.value!r} of another package does not load", error, "mend or remove it"
            ) from error
        if architectures.setdefault(entry.name, loaded) is not loaded:
            raise KvcompileError(f"architecture {entry.name!r} is there twice", entry.value, "remove one of the two")
    return architectures
