"""The architectures that are known, by `model_type`: ours, and those of other packages."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvcompile.adapters.architecture import Architecture
from kvcompile.adapters.around import AROUND, INSIDE
from kvcompile.adapters.built_in import BUILT_IN, Family
from kvcompile.adapters.refused import REFUSED
from kvcompile.errors import KvcompileError, wrapped_errors
from kvcompile.models.forks import compiled_as
from kvcompile.models.outside import GROUP, outside
from kvcompile.plan.plan import Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FORK = "another model.architecture, or an architecture of its own (docs/add-an-architecture.md)"
FIXED_ROPES = ("default", "linear", "llama3", "yarn", "proportional")  # the others choose angles by the length they see


@functools.cache
def known() -> dict[str, Family | Architecture]:
    """Every known architecture, sorted by `model_type`: ours by their places, not imported yet, and outside ones.

    Raises KvcompileError for one of another package that is no `Architecture`, or has the name of one of ours.
    """
    for name, value in outside().items():
        if name in BUILT_IN:
            raise KvcompileError(f"architecture {name!r} is there twice", "kvcompile has it", "give yours another name")
        if not isinstance(value, Architecture):
            raise KvcompileError(f"entry point {name!r} of {GROUP} must be an Architecture", type(value).__name__)
    return dict(sorted({**BUILT_IN, **outside()}.items()))


def architecture(model_type: str) -> Architecture:
    """The architecture called `model_type`.

    Raises KvcompileError for any other: with the reason where it is a causal LM of transformers, else with the known.
    """
    entry = known().get(model_type)
    if entry is None and model_type in INSIDE:
        entry = Family(INSIDE[model_type], "")
    if entry is None and model_type in AROUND:
        raise KvcompileError(
            f"{model_type} reads images too, and is compiled around its text in Python, where it is loaded",
            fix="kvcompile.compile(AutoModelForImageTextToText.from_pretrained(...), ...)",
        )
    if entry is None and model_type in REFUSED:
        raise KvcompileError(
            f"{model_type} is not compiled: {REFUSED[model_type]}", fix="kvcompile ls models shows what is"
        )
    if entry is None:
        raise KvcompileError(
            "the architecture must be one that kvcompile has an adapter for",
            repr(model_type),
            f"use one of {', '.join(known())}",
        )
    if isinstance(entry, Architecture):
        return entry
    module, _, name = entry.place.partition(":")
    loaded: Architecture = getattr(import_module(f"kvcompile.adapters.families.{module}"), name)
    return loaded


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture of a model's config. Raises KvcompileError for one that is not known, or not causal."""
    name = compiled_as(config)
    if name != config.model_type and config.model_type in known():
        raise KvcompileError(
            f"model.architecture is for types that kvcompile does not know, and it compiles {config.model_type!r}",
            repr(name),
            "leave it out",
        )
    entry = architecture(name)
    entry.require_known(config)
    bidirectional = getattr(config, "use_bidirectional_attention", False)
    if bidirectional and bidirectional != "vision":  # which is that of image tokens alone
        raise KvcompileError(
            "a KV cache needs causal attention", "use_bidirectional_attention=True", "use a causal checkpoint"
        )
    return entry


def describe(config: PretrainedConfig, dtype: str = "float32") -> Plan:
    """The identity plan of a model, from its config alone. Raises KvcompileError as `architecture_of` does."""
    entry, name = architecture_of(config), compiled_as(config)
    if name == config.model_type:
        return entry.describe(config, dtype)
    with wrapped_errors(
        f"{config.model_type!r} is compiled as {name!r} only where its config says what that does", FORK
    ):
        return entry.describe(config, dtype)


def lengthwise_ropes(config: Any) -> list[str]:
    """Kinds of rotary embedding in a config whose angles depend on the length of the input."""
    config = config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [x for x in ropes.values() if isinstance(x, dict)]  # by layer type
    kinds = {str(x.get("rope_type", "default")) for x in (nested or [ropes])}
    return sorted(kinds - {*FIXED_ROPES})


def require_turnable(plan: Plan, config: PretrainedConfig) -> None:
    """Raise KvcompileError where a score turns queries on by positions whose angles depend on the prompt's length.

    Or where a text is read again behind itself, which makes it longer.
    """
    replayed = plan.selected[0].selection if plan.replayed is not None else None
    if replayed is not None and lengthwise_ropes(config):
        raise KvcompileError(
            f"{replayed.replayer}: a replay stands behind the text, and must not move the angles of what follows it",
            f"rope {lengthwise_ropes(config)[0]!r}",
            f"another policy than {replayed.replayer!r}, such as expected_attention",
        )
    for p in plan.selected:
        if p.selection is not None and p.selection.score.needs.rotation and p.rotates and lengthwise_ropes(config):
            raise KvcompileError(
                f"{p.selection.policy}: queries are turned on by rotary angles that no prompt changes",
                f"rope {lengthwise_ropes(config)[0]!r}",
                f"another score than that of {p.selection.policy!r}, such as expected_attention",
            )
