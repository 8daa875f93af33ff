"""Exporters by name. A new one is a module and its line in `EXPORTERS`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from kvcompile.errors import KvcompileError
from kvcompile.exporters.base import Exporter
from kvcompile.options import filled
from kvcompile.plan.extensions import imported, named
from kvcompile.plan.plan import Plan

EXPORTERS = {  # in the order in which an error recommends them
    "hf": "kvcompile.exporters.hf:HF",
    "gguf": "kvcompile.exporters.gguf.exporter:GGUF",
    "onnx": "kvcompile.exporters.onnx:ONNX",
    "deepseek": "kvcompile.exporters.deepseek:Deepseek",
    "torch": "kvcompile.exporters.torch_export:TorchProgram",
    "aoti": "kvcompile.exporters.aoti:AOTI",
    "vllm": "kvcompile.exporters.vllm:VLLM",
}


@functools.cache
def discover() -> dict[str, type[Exporter]]:
    """All exporters by name."""
    return imported(EXPORTERS)


def exporter_class(name: str) -> type[Exporter]:
    """The exporter called `name`. Raises KvcompileError with the nearest name and the list of all."""
    return named("exporter", name, discover())


def build_exporters(options: Mapping[str, Mapping[str, Any] | None]) -> tuple[Exporter, ...]:
    """The exporters with their options over the defaults, in order.

    Raises KvcompileError for an unknown exporter or option, a value of the wrong type or out of range.
    """
    return tuple(filled(exporter_class(name), f"export.{name}", values or {}) for name, values in options.items())


def require_open(exporters: Sequence[Exporter], plan: Plan, model_config: Any) -> None:
    """Raise KvcompileError, with the reason and the exporters that can write it, if one of `exporters` cannot."""
    if plan.blocks is not None and exporters:
        raise KvcompileError(
            f"export={exporters[0].name}: a block transformer runs in kvcompile alone: half of its layers run only in "
            "steps that complete a block",
            "'block_transformer' in the stack",
            "drop export, and save it as an artifact",
        )
    for exporter in exporters:
        try:
            exporter.refuse(plan, model_config)
        except KvcompileError as error:
            others = open_exporters(plan, model_config, without=exporter.name)
            fix = error.fix or (f"export=[{others[0]}]" if others else "drop it from export")
            raise KvcompileError(f"export={exporter.name}: {error.rule}", error.got, fix) from error


def open_exporters(plan: Plan, model_config: Any, without: str = "") -> list[str]:
    """Names of the exporters that, with default options, could write a plan."""
    names = []
    for name, cls in discover().items():
        if name == without:
            continue
        try:
            cls().refuse(plan, model_config)
        except KvcompileError:
            continue
        names.append(name)
    return names
