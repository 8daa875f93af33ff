"""Packages that only healing needs."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from kvcompile.errors import KvcompileError


def needed(name: str, what: str) -> Any:
    """The module `name`. Raises KvcompileError where it is not installed."""
    if importlib.util.find_spec(name) is None:
        raise KvcompileError(f"{what} needs the {name} package", "none installed", "pip install kvcompile[heal]")
    return importlib.import_module(name)
