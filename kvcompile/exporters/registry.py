"""Doors by name. A new one is a module and its line in `EXPORTERS`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from kvcompile.errors import KvcompileError
from kvcompile.exporters.base import Exporter
from kvcompile.options import filled, suggest
from kvcompile.plan.plan import Plan

EXPORTERS = {  # in the order in which an error recommends them
    "hf": "kvcompile.exporters.hf:HF",
    "gguf": "kvcompile.exporters.gguf.exporter:GGUF",
    "onnx": "kvcompile.exporters.onnx:ONNX",
    "deepseek": "kvcompile.exporters.deepseek:Deepseek",
    "torch": "kvcompile.exporters.torch_export:TorchProgram",
    "aoti": "kvcompile.exporters.aoti:AOTI",
}


@functools.cache
def discover() -> dict[str, type[Exporter]]:
    """All doors by name."""
    found = {}
    for name, place in EXPORTERS.items():
        module, _, cls = place.partition(":")
        found[name] = getattr(import_module(module), cls)
    return found


def door_class(name: str) -> type[Exporter]:
    """The door called `name`. Raises KvcompileError with the nearest name and the list of all."""
    if name not in EXPORTERS:
        raise KvcompileError("unknown export", repr(name), suggest(name, EXPORTERS))
    return discover()[name]


def build_exporters(options: Mapping[str, Mapping[str, Any] | None]) -> tuple[Exporter, ...]:
    """The doors with their options over the defaults, in order.

    Raises KvcompileError for an unknown door or option, a value of the wrong type or out of range.
    """
    return tuple(filled(door_class(name), f"export.{name}", given or {}) for name, given in options.items())


def require_open(exporters: Sequence[Exporter], plan: Plan, model_config: Any) -> None:
    """Raise KvcompileError, with the reason and the doors that are open, if one of `exporters` is not."""
    for exporter in exporters:
        try:
            exporter.refuse(plan, model_config)
        except KvcompileError as error:
            others = open_doors(plan, model_config, without=exporter.name)
            fix = error.fix or (f"export=[{others[0]}]" if others else "drop it from export")
            raise KvcompileError(f"export={exporter.name}: {error.rule}", error.got, fix) from error


def open_doors(plan: Plan, model_config: Any, without: str = "") -> list[str]:
    """Names of the doors, with default options, that a plan could go through."""
    found = []
    for name, cls in discover().items():
        if name == without:
            continue
        try:
            cls().refuse(plan, model_config)
        except KvcompileError:
            continue
        found.append(name)
    return found
