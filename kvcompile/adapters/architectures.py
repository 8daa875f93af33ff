"""Which architectures are known: their adapter, and how the facts of each layer are read from their config."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvcompile.adapters.base import Attention
from kvcompile.adapters.families import Fused, HeadNormed, Interleaved, Separate, WidthNormed
from kvcompile.errors import KvcompileError
from kvcompile.models.loading import require_weights
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.runtime.live import require_unhooked

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotary(config: Any) -> int:
    """Channels of a head that RoPE turns."""
    given = getattr(config, "rope_parameters", None) or {}
    return int(_head_dim(config) * (given.get("partial_rotary_factor") or 1.0))


def _by_head_dim(config: Any) -> float:
    return float(_head_dim(config) ** -0.5)


def _by_scalar(config: Any) -> float:
    return float(config.query_pre_attn_scalar**-0.5)


def _no_window(config: Any, layer: int) -> int | None:
    return None


def _one_window(config: Any, layer: int) -> int | None:
    return getattr(config, "sliding_window", None)


def _typed_window(config: Any, layer: int) -> int | None:
    kind = config.layer_types[layer]
    if kind not in ("full_attention", "sliding_attention"):
        raise KvcompileError(f"layer {layer}: attention must be full or sliding", kind, "use another checkpoint")
    return config.sliding_window if kind == "sliding_attention" else None


@dataclass(frozen=True)
class Architecture:
    """One `model_type`: its adapter, the name of the attention in a decoder layer, and its layers' facts."""

    adapter: type[Attention]
    attention: str = "self_attn"
    scale: Callable[[Any], float] = _by_head_dim
    window: Callable[[Any, int], int | None] = _no_window
    softcap: Callable[[Any], float | None] = lambda config: None
    rotates: Callable[[Any, int], bool] = lambda config, layer: True
    rotary_per_type: bool = False  # the rotary module wants the layer's type


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(Separate),
    "mistral": Architecture(Separate, window=_one_window),
    "mixtral": Architecture(Separate, window=_one_window),
    "qwen2": Architecture(Separate, window=_typed_window),
    "qwen3": Architecture(HeadNormed, window=_typed_window),
    "smollm3": Architecture(
        Separate, window=_typed_window, rotates=lambda config, layer: bool(config.no_rope_layers[layer])
    ),
    "olmo2": Architecture(WidthNormed),
    "granite": Architecture(Separate, scale=lambda config: float(config.attention_multiplier)),
    "phi3": Architecture(Fused, window=_one_window),
    "gemma2": Architecture(
        Separate, scale=_by_scalar, window=_typed_window, softcap=lambda config: config.attn_logit_softcapping
    ),
    "gemma3_text": Architecture(HeadNormed, scale=_by_scalar, window=_typed_window, rotary_per_type=True),
    "gpt_neox": Architecture(Interleaved, attention="attention"),
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The known architecture of a config. Raises KvcompileError, listing the known ones, for any other."""
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise KvcompileError(
            "the architecture must be one that kvcompile has an adapter for",
            repr(config.model_type),
            f"use one of {', '.join(sorted(ARCHITECTURES))}",
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise KvcompileError(
            "a KV cache needs causal attention", "use_bidirectional_attention=True", "use a causal checkpoint"
        )
    return known


def describe(config: PretrainedConfig, dtype: str = "float32") -> Plan:
    """The identity plan of a model, from its config alone: every layer owns its cache and keeps all.

    Raises KvcompileError for unknown architectures.
    """
    known = architecture_of(config)
    heads: int = config.num_attention_heads
    layers = tuple(
        LayerPlan(
            index=index,
            query_heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=_head_dim(config),
            owner=index,
            scale=known.scale(config),
            sliding_window=known.window(config, index),
            softcap=known.softcap(config),
            rotates=known.rotates(config, index),
            rotary=_rotary(config) if known.rotates(config, index) else 0,
            key_norm="k_norm" in known.adapter.keeps,
        )
        for index in range(config.num_hidden_layers)
    )
    return Plan(architecture=config.model_type, dtype=dtype, layers=layers)


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of a model of known architecture, by layer."""
    name = architecture_of(model.config).attention
    return [getattr(layer, name) for layer in _base(model).layers]


def swap(model: PreTrainedModel, plan: Plan | None = None) -> list[str]:
    """Put our adapter in place of every attention module, in place; return their qualified names.

    plan: that of the weights the model has now (default: what its config says).

    Nothing is changed unless all can be. Raises KvcompileError for unknown architectures, weights that are not in
    memory, a model compiled before, and where the module disagrees with what its config says.
    """
    known, plan = architecture_of(model.config), plan or describe(model.config)
    require_weights(model)
    require_as_configured(model)
    adapters = []
    for original, facts in zip(attentions(model), plan.layers, strict=True):
        _require_plain(original, facts)
        adapters.append(known.adapter(original, facts))
    for layer, adapter in zip(_base(model).layers, adapters, strict=True):
        setattr(layer, known.attention, adapter)
    return [name for name, module in model.named_modules() if isinstance(module, Attention)]


def rotary(model: PreTrainedModel, layer: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The rotation of one layer: positions `[n]` to cos, sin `[n, D_rot]`, float32, by the model's own rotary module.

    A layer without position embedding gets the identity (cos 1, sin 0). The module is copied: types that adapt to the
    longest position seen must not be disturbed by a question.
    """
    known, config = architecture_of(model.config), model.config
    module = copy.deepcopy(_base(model).rotary_emb)
    kind = {"layer_type": config.layer_types[layer]} if known.rotary_per_type else {}
    width, turns = _head_dim(config), known.rotates(config, layer)

    def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        if not turns:
            return like.new_ones(len(positions), width), like.new_zeros(len(positions), width)
        cos, sin = module(like, position_ids=positions.unsqueeze(0), **kind)
        return cos[0], sin[0]

    return rotation


def rotations(model: PreTrainedModel) -> list[Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """`rotary` of every layer; layers that turn alike share one, so that a pass need ask for an angle only once."""
    known, config = architecture_of(model.config), model.config
    shared: dict[tuple[str | None, bool], Callable[[Tensor], tuple[Tensor, Tensor]]] = {}
    kinds = [
        (config.layer_types[layer] if known.rotary_per_type else None, known.rotates(config, layer))
        for layer in range(config.num_hidden_layers)
    ]
    for layer, kind in enumerate(kinds):
        if kind not in shared:
            shared[kind] = rotary(model, layer)
    return [shared[kind] for kind in kinds]


def _base(model: PreTrainedModel) -> Any:
    return getattr(model, model.base_model_prefix)


def require_as_configured(model: PreTrainedModel) -> None:
    """Raise KvcompileError where a model is not what its config says, or would not run as it stands once traced."""
    known, config, base = architecture_of(model.config), model.config, _base(model)
    if len(base.layers) != config.num_hidden_layers:
        raise KvcompileError(
            f"a model has as many layers as its config says, {config.num_hidden_layers}",
            f"{len(base.layers)}",
            f"after layers were taken out, set config.num_hidden_layers={len(base.layers)}, and lists of the config by "
            "layer (layer_types) to match",
        )
    require_unhooked("the base model", base)
    for index, layer in enumerate(base.layers):
        require_unhooked(f"layer {index}", layer)
        require_unhooked(f"layer {index}: {known.attention}", getattr(layer, known.attention))


def _require_plain(original: nn.Module, facts: LayerPlan) -> None:
    if isinstance(original, Attention):
        raise KvcompileError("a model is compiled once", "one that is compiled already", "load it afresh")
    scale = getattr(original, "scaling", facts.scale)
    window = getattr(original, "sliding_window", facts.sliding_window)
    turns = bool(getattr(original, "use_rope", facts.rotates))
    if (scale, window, turns) != (facts.scale, facts.sliding_window, facts.rotates):
        raise KvcompileError(
            f"layer {facts.index}: scale, window and position embedding must be what the config says",
            f"{scale}, {window}, {turns} instead of {facts.scale}, {facts.sliding_window}, {facts.rotates}",
            "use the transformers version that the checkpoint was made for; if layers were taken out, take them out of "
            "the config's lists too (layer_types, no_rope_layers)",
        )
