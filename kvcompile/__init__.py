"""A declarative compiler for the KV cache of Hugging Face causal language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcompile.artifact.artifact import from_pretrained, load, save
    from kvcompile.compiler import compile as compile
    from kvcompile.errors import KvcompileError as KvcompileError
    from kvcompile.exporters.write import export
    from kvcompile.searching.command import search
    from kvcompile.tasks.run import evaluate

    __version__: str

_PUBLIC = {
    "compile": "kvcompile.compiler",
    "load": "kvcompile.artifact.artifact",
    "save": "kvcompile.artifact.artifact",
    "from_pretrained": "kvcompile.artifact.artifact",
    "export": "kvcompile.exporters.write",
    "evaluate": "kvcompile.tasks.run",
    "search": "kvcompile.searching.command",
    "KvcompileError": "kvcompile.errors",
}
__all__ = [
    "KvcompileError",
    "__version__",
    "compile",
    "evaluate",
    "export",
    "from_pretrained",
    "load",
    "save",
    "search",
]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that `import kvcompile` costs and does nothing."""
    if name == "__version__":
        from importlib.metadata import version

        return version("kvcompile")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvcompile' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
