"""The architectures that are known, by `model_type`: ours, and those of other packages."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from kvcompile.adapters.architecture import Architecture
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GROUP = "kvcompile.architectures"
BUILT_IN = {
    "gemma2": "llama:GEMMA2",
    "gemma3_text": "qwen3:GEMMA3",
    "gpt_neox": "gpt_neox:GPT_NEOX",
    "granite": "llama:GRANITE",
    "llama": "llama:LLAMA",
    "mistral": "llama:MISTRAL",
    "mixtral": "llama:MIXTRAL",
    "olmo2": "olmo2:OLMO2",
    "phi3": "phi3:PHI3",
    "qwen2": "llama:QWEN2",
    "qwen3": "qwen3:QWEN3",
    "smollm3": "llama:SMOLLM3",
}


@functools.cache
def known() -> dict[str, EntryPoint]:
    """Where each known architecture is, sorted by `model_type`; none is loaded.

    Raises KvcompileError for an entry point whose name is taken.
    """
    found = {name: EntryPoint(name, f"kvcompile.adapters.{place}", GROUP) for name, place in BUILT_IN.items()}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise KvcompileError(f"architecture {entry.name!r} is there twice", f"{entry.value} and {other.value}")
    return dict(sorted(found.items()))


@functools.cache
def architecture(model_type: str) -> Architecture:
    """The architecture called `model_type`.

    Raises KvcompileError, listing the known ones, for any other, and where that of another package does not load.
    """
    entry = known().get(model_type)
    if entry is None:
        raise KvcompileError(
            "the architecture must be one that kvcompile has an adapter for",
            repr(model_type),
            f"use one of {', '.join(known())}",
        )
    try:
        found = entry.load()
    except Exception as error:
        raise KvcompileError(
            f"the architecture {entry.value!r} of another package does not load", error, "mend or remove it"
        ) from error
    if not isinstance(found, Architecture):
        raise KvcompileError(f"entry point {model_type!r} of {GROUP} must be an Architecture", entry.value)
    return found


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture of a model's config. Raises KvcompileError for one that is not known, or not causal."""
    found = architecture(config.model_type)
    if getattr(config, "use_bidirectional_attention", False):
        raise KvcompileError(
            "a KV cache needs causal attention", "use_bidirectional_attention=True", "use a causal checkpoint"
        )
    return found


def describe(config: PretrainedConfig, dtype: str = "float32") -> Plan:
    """The identity plan of a model, from its config alone. Raises KvcompileError as `architecture_of` does."""
    return architecture_of(config).describe(config, dtype)


def load_outside() -> None:
    """Load the architectures of other packages: they make their configs and models known to transformers, too."""
    for name in known():
        if name not in BUILT_IN:
            architecture(name)
