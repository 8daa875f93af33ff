"""One architecture: its adapter, the facts of its layers, and what is done to a model by them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvcompile.adapters.base import Attention
from kvcompile.adapters.layout import Layout
from kvcompile.errors import KvcompileError
from kvcompile.models.loading import require_weights
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.structure import Latent
from kvcompile.runtime.cache import Rotary
from kvcompile.runtime.live import base_model, require_unhooked

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def by_head_dim(config: Any) -> float:
    """Attention scaled by D^-1/2, D the channels of a head."""
    return float(channels(config) ** -0.5)


def by_scalar(config: Any) -> float:
    """Attention scaled by `query_pre_attn_scalar`^-1/2."""
    return float(config.query_pre_attn_scalar**-0.5)


def one_window(config: Any, layer: int) -> int | None:
    """The same sliding window in all layers; None where the config has none."""
    return getattr(config, "sliding_window", None)


def typed_window(config: Any, layer: int) -> int | None:
    """A sliding window in layers whose type in the config says so."""
    kind = config.layer_types[layer]
    if kind not in ("full_attention", "sliding_attention"):
        raise KvcompileError(f"layer {layer}: attention must be full or sliding", kind, "use another checkpoint")
    return config.sliding_window if kind == "sliding_attention" else None


def by_config(config: Any, layer: int) -> tuple[int, int]:
    """Query heads and KV heads, the same in all layers."""
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def channels(config: Any) -> int:
    """Channels of a head: what the config says, or what the hidden size leaves each."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def turning(config: Any, layer: int) -> int:
    """Channels of a head that RoPE turns: all, or the factor of the layer's type."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_type" not in rope and getattr(config, "layer_types", None):
        rope = rope.get(config.layer_types[layer]) or {}
    return int(channels(config) * (rope.get("partial_rotary_factor") or 1.0))


def everywhere(config: Any, layer: int) -> bool:
    """All layers."""
    return True


def level(config: Any) -> tuple[float, ...]:
    """No logits that fall with distance."""
    return ()


def nothing(config: Any, dtype: str) -> int:
    """No bytes of states."""
    return 0


@dataclass(frozen=True)
class Architecture:
    """One `model_type` of transformers: how its attention is adapted, and the facts of its layers by its config.

    adapter: of the attention modules, which each decoder layer has under the name `attention`. in_layer: so many, in a
    list of that name where there are several. layers: the list of decoder layers, below the base model. heads: query
    heads and KV heads of a layer. head_dim: channels of each. value_head: of a value, where a key has others (None: it
    has not). scale: what queries times keys are multiplied by. window: tokens that a layer sees (None: all). chunked:
    it begins at multiples of its length, and does not slide. softcap: c of c tanh(x / c) over the logits (None: none).
    rotates: whether a layer has rotary positions. turning: channels of a head that these turn. rotary_module: what
    gives the angles of a layer, in the base model. rotary_per_type: it wants the type of the layer. refuses: what of a
    config is not compiled (None: nothing). attends: whether a decoder layer has keys and values. states: bytes that the
    others keep of one sequence. restarts: in transformers these begin anew in a pass of several tokens. grid: positions
    are those of text, time, height and width. alibi: what logits of each query head fall by with every token of
    distance (empty: nothing). alibi_rounded: these are products in bfloat16. sinks: whether a layer has the learned
    sinks of its adapter. unused: methods and switches of the base model that make what our attention does not read.
    normed: whether a config has the norms of its adapter. grouped: the stock class can have fewer KV heads than query
    heads. latent: the row that a layer caches in place of keys and values (None: it caches these). reads: the earlier
    layer whose keys and values a layer attends to (None: its own).
    """

    adapter: type[Attention]
    attention: str = "self_attn"
    in_layer: int = 1
    layers: str = "layers"
    heads: Callable[[Any, int], tuple[int, int]] = by_config
    head_dim: Callable[[Any, int], int] = lambda config, layer: channels(config)
    value_head: Callable[[Any], int | None] = lambda config: None
    scale: Callable[[Any], float] = by_head_dim
    window: Callable[[Any, int], int | None] = lambda config, layer: None
    chunked: Callable[[Any, int], bool] = lambda config, layer: False
    softcap: Callable[[Any], float | None] = lambda config: None
    rotates: Callable[[Any, int], bool] = lambda config, layer: True
    turning: Callable[[Any, int], int] = turning
    rotary_module: Callable[[Any, int], nn.Module] = lambda base, layer: base.rotary_emb
    rotary_per_type: bool = False
    attends: Callable[[Any, int], bool] = everywhere
    states: Callable[[Any, str], int] = nothing
    restarts: bool = False
    grid: bool = False
    alibi: Callable[[Any], tuple[float, ...]] = level
    alibi_rounded: bool = False
    sinks: Callable[[Any, int], bool] = everywhere
    unused: tuple[str, ...] = ()
    normed: Callable[[Any], bool] = lambda config: True
    refuses: Callable[[Any], str | None] = lambda config: None
    grouped: bool = True
    latent: Callable[[Any], Latent | None] = lambda config: None
    reads: Callable[[Any, int], int | None] = lambda config, layer: None

    def describe(self, config: PretrainedConfig, dtype: str = "float32") -> Plan:
        """The identity plan of a model, from its config alone: every layer owns its cache and keeps all."""
        layers = tuple(self._facts(config, index, layer) for index, layer in enumerate(self.attending(config)))
        states = self.states(config, dtype)
        return Plan(architecture=config.model_type, dtype=dtype, layers=layers, state_bytes=states)

    def attending(self, config: Any) -> list[int]:
        """The decoder layers that attend: all, but where some keep a state in place of keys and values."""
        return [layer for layer in range(config.num_hidden_layers) if self.attends(config, layer)]

    def require_known(self, config: Any) -> None:
        """Raise KvcompileError where a config of this type asks for what is not compiled."""
        reason = self.refuses(config)
        if reason is not None:
            raise KvcompileError(f"{config.model_type} is compiled, but not where {reason}", fix="another checkpoint")

    def _facts(self, config: Any, index: int, layer: int) -> LayerPlan:
        query_heads, kv_heads = self.heads(config, layer)
        rotates, source, alibi = self.rotates(config, layer), self.reads(config, layer), self.alibi(config)
        return LayerPlan(
            index=index,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=self.head_dim(config, layer),
            owner=index if source is None else self.attending(config).index(source),
            value_head=self.value_head(config),
            scale=self.scale(config),
            sliding_window=self.window(config, layer),
            chunked=self.chunked(config, layer),
            softcap=self.softcap(config),
            rotates=rotates,
            rotary=self.turning(config, layer) if rotates else 0,
            turnable=self.adapter.turnable and not alibi,
            key_norm=bool(self.adapter.norms) and self.normed(config),
            sink="sinks" in self.adapter.learned and self.sinks(config, layer),
            alibi=alibi,
            alibi_rounded=self.alibi_rounded and bool(alibi),
            latent=self.latent(config),
            shared=source is not None,
        )

    def places(self, model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
        """Where the attentions of a model stand: decoder layer, and name in it."""
        decoders: Any = _base(model).get_submodule(self.layers)
        if self.in_layer == 1:
            return [(decoders[layer], self.attention) for layer in self.attending(model.config)]
        by_layer = (divmod(layer, self.in_layer) for layer in self.attending(model.config))
        return [(decoders[layer], f"{self.attention}.{which}") for layer, which in by_layer]

    def attentions(self, model: PreTrainedModel) -> list[nn.Module]:
        """The attention modules of a model, by layer of the plan."""
        return [layer.get_submodule(name) for layer, name in self.places(model)]

    def layouts(self, model: PreTrainedModel, plan: Plan, converted: bool = False) -> list[Layout]:
        """The projections of the attentions of an uncompiled model, by layer.

        converted: the weights are those of `plan` already; otherwise they are the original's.
        Raises KvcompileError for an adapter without a layout.
        """
        kind, out = self.adapter.layout, self.adapter.out
        if kind is None:
            raise KvcompileError(
                "weights can be converted only in layouts that are known",
                self.adapter.__name__,
                "use policies that leave the weights as they are",
            )
        return [
            kind(attention, p.query_heads, p.kv_heads if converted else p.dense_heads, p.head_dim, out)
            for attention, p in zip(self.attentions(model), plan.layers, strict=True)
        ]

    def swap(self, model: PreTrainedModel, plan: Plan) -> list[str]:
        """Put our adapter in place of every attention module, in place; return their qualified names.

        plan: that of the weights the model has now.

        Nothing is changed unless all can be. Raises KvcompileError for weights that are not in memory, a model compiled
        before, and where the module disagrees with what its config says.
        """
        require_weights(model)
        self.require_as_configured(model)
        adapters = []
        for original, facts in zip(self.attentions(model), plan.layers, strict=True):
            _require_plain(original, facts)
            adapters.append(self.adapter(original, facts))
        for (layer, name), adapter in zip(self.places(model), adapters, strict=True):
            layer.set_submodule(name, adapter)
        for name in self.unused:
            setattr(_base(model), name, _unmade if callable(getattr(_base(model), name)) else None)
        return [name for name, module in model.named_modules() if isinstance(module, Attention)]

    def rotary(self, model: PreTrainedModel, index: int) -> Rotary:
        """The rotation of a layer of a plan: positions `[n]` to cos, sin `[n, D_rot]`, float32, by the model's module.

        A layer without position embedding gets the identity (cos 1, sin 0). The module is copied: types that adapt to
        the longest position seen must not be disturbed by a question.
        """
        config = model.config
        layer = self.attending(config)[index]
        kind = {"layer_type": config.layer_types[layer]} if self.rotary_per_type else {}
        width, turns = self.head_dim(config, layer), self.rotates(config, layer)
        module = copy.deepcopy(self.rotary_module(_base(model), layer)) if turns else None

        def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
            like = torch.empty(0, dtype=torch.float32, device=positions.device)
            if module is None:
                return like.new_ones(len(positions), width), like.new_zeros(len(positions), width)
            cos, sin = self.adapter.angles(module(like, position_ids=positions.unsqueeze(0), **kind))
            return cos[0], sin[0]

        return rotation

    def rotations(self, model: PreTrainedModel) -> list[Rotary]:
        """`rotary` of every layer; layers that turn alike share one, so that a pass need ask for an angle only once."""
        config, base = model.config, _base(model)
        attending = self.attending(config)
        modules = [self.rotary_module(base, i) if self.rotates(config, i) else None for i in attending]
        kinds = [
            (id(module), config.layer_types[layer] if self.rotary_per_type and module is not None else None)
            for layer, module in zip(attending, modules, strict=True)
        ]
        shared: dict[tuple[int, str | None], Rotary] = {}
        for index, kind in enumerate(kinds):
            if kind not in shared:
                shared[kind] = self.rotary(model, index)
        return [shared[kind] for kind in kinds]

    def require_as_configured(self, model: PreTrainedModel) -> None:
        """Raise KvcompileError where a model is not what its config says, or would not run as it stands once traced."""
        config, layers = model.config, list(_base(model).get_submodule(self.layers).children())
        if len(layers) * self.in_layer != config.num_hidden_layers:
            raise KvcompileError(
                f"a model has as many layers as its config says, {config.num_hidden_layers}",
                f"{len(layers)}",
                f"after layers were taken out, set config.num_hidden_layers={len(layers)}, and lists of the "
                "config by layer (layer_types) to match",
            )
        require_unhooked("the base model", _base(model))
        for index, layer in enumerate(layers):
            require_unhooked(f"layer {index}", layer)
        for index, attention in enumerate(self.attentions(model)):
            require_unhooked(f"layer {index}: {self.attention}", attention)


def _unmade(*args: Any, **kwargs: Any) -> None:
    """Nothing, in place of what nobody reads."""


def _base(model: PreTrainedModel) -> Any:
    return base_model(model)[1]


def _require_plain(original: nn.Module, facts: LayerPlan) -> None:
    if isinstance(original, Attention):
        raise KvcompileError("a model is compiled once", "one that is compiled already", "load it afresh")
    scale = getattr(original, "scaling", facts.scale)
    sliding = getattr(original, "is_sliding", True)
    window = getattr(original, "sliding_window", facts.sliding_window) if sliding else None
    turns = bool(getattr(original, "use_rope", facts.rotates))
    if (scale, window, turns) != (facts.scale, facts.sliding_window, facts.rotates):
        raise KvcompileError(
            f"layer {facts.index}: scale, window and position embedding must be what the config says",
            f"{scale}, {window}, {turns} instead of {facts.scale}, {facts.sliding_window}, {facts.rotates}",
            "use the transformers version that the checkpoint was made for; if layers were taken out, take them out of "
            "the config's lists too (layer_types, no_rope_layers)",
        )
