"""The names that `kernels=` and `model.weights=` take, known without importing a backend."""

from __future__ import annotations

from importlib.metadata import entry_points

GROUP = "kvcompile.backends"
BUILT_IN = ("cpp", "triton", "sdpa", "reference")
WEIGHTS = {"int8": 8, "int4": 4}  # formats of weights in few bits (`packed.py`), and their bits


def names() -> tuple[str, ...]:
    """All backends that are installed: ours, and those of other packages, which register the entry point group."""
    return (*BUILT_IN, *sorted({entry.name for entry in entry_points(group=GROUP)} - set(BUILT_IN)))
