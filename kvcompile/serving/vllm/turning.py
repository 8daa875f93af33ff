"""How a served model turns queries by their positions: from its config alone, so that queries can be turned back."""

from __future__ import annotations

from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor

from kvcompile.adapters.architectures import architecture_of
from kvcompile.adapters.base import Attention
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.runtime.cache import Rotary
from kvcompile.runtime.positions import turned
from kvcompile.serving.vllm.rules import PromptRule

KNOWN_ROPES = ("default", "linear", "llama3")  # one formula each, the same in vLLM and in transformers


def require_known_turns(plan: Plan, config: Any) -> None:
    """Raise KvcompileError for a score that turns queries, in a model whose way to turn them was not compared."""
    wanting = [p for p in plan.selected if p.selection is not None and p.rotates and PromptRule(p.selection).turns]
    if not wanting:
        return
    where = f"{wanting[0].selection.policy!r} in {config.model_type}"  # type: ignore[union-attr]
    ropes = sorted(_ropes(config) - {*KNOWN_ROPES})
    if ropes:
        raise KvcompileError(
            "queries are turned back in vLLM where angles follow from positions alone, by a formula that was compared",
            f"rope {ropes[0]!r}, {where}",
            "a score that looks at keys, or at the last queries",
        )
    adapter = architecture_of(config).adapter
    if adapter.pairs or getattr_static(adapter, "angles") is not getattr_static(Attention, "angles"):
        raise KvcompileError(
            "queries are turned back in vLLM where the channels that turn together lie half a head apart",
            where,
            "a score that looks at keys, or at the last queries",
        )


def _ropes(config: Any) -> set[str]:
    """Kinds of rotary embedding in a config."""
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [x for x in ropes.values() if isinstance(x, dict)]  # by type of layer
    return {str(x.get("rope_type", "default")) for x in (nested or [ropes])}


def rotations(config: Any) -> list[Rotary]:
    """The rotation of each layer, as `Architecture.rotations` gives it, of a model that is not there."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    base = model.base_model
    for name, module in list(base.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding"):  # of tables alone, which meta tensors do not hold
            base.set_submodule(name, type(module)(config=config))
    return architecture_of(config).rotations(model)


def turned_back(queries: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """Queries `[..., n, D]` that were turned to `positions [n]`, as they were before, in float32.

    An amplitude in the rotary table is taken back too.
    """
    cos, sin = (x.float() for x in rotary(positions))
    amplitude = cos.square() + sin.square()
    return turned(queries.float(), cos / amplitude, -sin / amplitude)
