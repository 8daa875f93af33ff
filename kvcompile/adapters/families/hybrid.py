"""Models some of whose layers keep a state in place of keys and values: only the attentions are compiled.

The others run as transformers has them, with transformers' own cache of their states.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture, channels, typed_window
from kvcompile.adapters.families.deepseek import DEEPSEEK_V3, MINICPM3, Bailing
from kvcompile.adapters.families.gpt2 import never
from kvcompile.adapters.families.llama import Separate, by_multiplier
from kvcompile.adapters.families.olmo2 import WidthNormed
from kvcompile.adapters.families.qwen3 import HeadNormed
from kvcompile.plan.plan import DTYPE_BYTES, LayerPlan


class QueryGated(HeadNormed):
    """Each query head has a gate beside it, in one projection: qwen3_next, qwen3_5."""

    layout = None

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """`[B, Q, H 2 D]` in queries and gates."""
        both = torch.unflatten(self.q_proj(states), -1, (-1, 2, self.head_dim))
        queries, gates = torch.unbind(both, -2)
        keys, values = self.heads(self.k_proj(states)), self.heads(self.v_proj(states))
        gate = torch.sigmoid(gates.flatten(-2))
        return self.normed(queries.transpose(1, 2), 0), self.normed(keys, 1), values, gate


class Lfm2(HeadNormed):
    """Norms and output under other names: lfm2."""

    layout = None
    norms: ClassVar[tuple[str, ...]] = ("q_layernorm", "k_layernorm")
    keeps: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj", *norms)
    out: ClassVar[str] = "out_proj"


class Lfm3(HeadNormed):
    """A gate of each head where the config says so, turned in float32: lfm3."""

    layout = None
    in_float: ClassVar[bool] = True
    optional: ClassVar[tuple[str, ...]] = ("g_proj",)

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """sigmoid(W h)."""
        gate: nn.Module | None = getattr(self, "g_proj", None)
        return super().project(states) if gate is None else (*super().project(states), torch.sigmoid(gate(states)))


class Multiplied(Separate):
    """Keys times a number: falcon_h1."""

    layout = None

    def __init__(self, original: nn.Module, plan: LayerPlan) -> None:
        super().__init__(original, plan)
        self.multiplier: Any = original.key_multiplier

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """k = m W h."""
        keys = self.heads(self.k_proj(states) * self.multiplier)
        return self.heads(self.q_proj(states)), keys, self.heads(self.v_proj(states))


class Tied(Separate):
    """Weights of several layers, with what each adds to its projections where the config says so: zamba, zamba2."""

    layout = None
    adds: ClassVar[tuple[str, ...]] = ("linear_q_adapter_list", "linear_k_adapter_list", "linear_v_adapter_list")
    optional: ClassVar[tuple[str, ...]] = adds

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """W h + B A h, with A and B of the layer."""
        parts = []
        for projection, name in zip((self.q_proj, self.k_proj, self.v_proj), self.adds, strict=True):
            added: nn.ModuleList | None = getattr(self, name, None)
            rows = projection(states)
            parts.append(self.heads(rows if added is None else rows + added[self.layer_idx](states)))
        return tuple(parts)


def attends(config: Any, layer: int) -> bool:
    """By the type of the layer."""
    return config.layer_types[layer] in ("full_attention", "sliding_attention")


def hybrid(config: Any, layer: int) -> bool:
    """A state and an attention in one layer; the others keep a state alone."""
    return bool(config.layer_types[layer] == "hybrid")


def by_half(config: Any) -> float:
    """Attention scaled by (D / 2)^-1/2."""
    return float((channels(config) / 2) ** -0.5)


def has_base(config: Any, layer: int) -> bool:
    """Rotary positions where the config has a base of their angles."""
    return (config.rope_parameters or {}).get("rope_theta") is not None


def _stateful(config: Any, kind: str) -> int:
    return sum(of == kind for of in config.layer_types)


def short(config: Any, dtype: str) -> int:
    """Convolutions over the last tokens, `[hidden, kernel]` each."""
    return int(_stateful(config, "conv") * config.hidden_size * config.conv_L_cache * DTYPE_BYTES[dtype])


def delta(config: Any, dtype: str) -> int:
    """Of each gated delta net the last inputs of its convolution, and a float32 state `[heads, D_k, D_v]`."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    inner = 2 * keys * config.linear_key_head_dim + values * config.linear_value_head_dim
    convolution = inner * config.linear_conv_kernel_dim * DTYPE_BYTES[dtype]
    state = values * config.linear_key_head_dim * config.linear_value_head_dim * DTYPE_BYTES["float32"]
    return int(_stateful(config, "linear_attention") * (convolution + state))


def kimi_delta(config: Any, dtype: str) -> int:
    """Of each delta attention the last inputs of its convolution, and a float32 state `[heads, D, D]`."""
    inner = config.linear_num_heads * config.linear_head_dim
    convolution = 3 * inner * config.linear_conv_kernel_dim * DTYPE_BYTES[dtype]
    state = inner * config.linear_head_dim * DTYPE_BYTES["float32"]
    return int(_stateful(config, "linear_attention") * (convolution + state))


def _mamba2(layers: int, inner: int, groups: int, state: int, kernel: int, dtype: str) -> int:
    """Of each mamba 2 layer the last inputs of its convolution, and a float32 state `[heads * D, state]`."""
    convolution = (inner + 2 * groups * state) * kernel * DTYPE_BYTES[dtype]
    return int(layers * (convolution + inner * state * DTYPE_BYTES["float32"]))


def bamba(config: Any, dtype: str) -> int:
    """Of bamba and granitemoehybrid."""
    inner = config.mamba_expand * config.hidden_size
    sizes = inner, config.mamba_n_groups, config.mamba_d_state, config.mamba_d_conv
    return _mamba2(_stateful(config, "linear_attention"), *sizes, dtype)


def falcon_h1(config: Any, dtype: str) -> int:
    """A state beside the attention of every layer."""
    inner = config.mamba_d_ssm or config.mamba_expand * config.hidden_size
    sizes = inner, config.mamba_n_groups, config.mamba_d_state, config.mamba_d_conv
    return _mamba2(config.num_hidden_layers, *sizes, dtype)


def nemotron_h(config: Any, dtype: str) -> int:
    """Of nemotron_h."""
    inner = config.mamba_num_heads * config.mamba_head_dim
    sizes = inner, config.n_groups, config.ssm_state_size, config.conv_kernel
    return _mamba2(_stateful(config, "linear_attention"), *sizes, dtype)


def _mamba(layers: int, config: Any, dtype: str) -> int:
    """Of each mamba layer the last inputs of its convolution, and a float32 state `[inner, state]`."""
    inner = config.mamba_expand * config.hidden_size
    convolution, state = config.mamba_d_conv * DTYPE_BYTES[dtype], config.mamba_d_state * DTYPE_BYTES["float32"]
    return int(layers * inner * (convolution + state))


def mamba(config: Any, dtype: str) -> int:
    """Of jamba."""
    return _mamba(_stateful(config, "linear_attention"), config, dtype)


def zamba(config: Any, dtype: str) -> int:
    """A state in every layer."""
    return _mamba(config.num_hidden_layers, config, dtype)


def zamba2(config: Any, dtype: str) -> int:
    """The same, of mamba 2."""
    inner = config.mamba_expand * config.hidden_size
    sizes = inner, config.mamba_ngroups, config.mamba_d_state, config.mamba_d_conv
    return _mamba2(config.num_hidden_layers, *sizes, dtype)


QWEN3_NEXT = Architecture(QueryGated, attends=attends, states=delta)
QWEN3_5 = Architecture(QueryGated, attends=attends, states=delta, grid=True)
LFM2 = Architecture(Lfm2, attends=attends, states=short)
LFM3 = Architecture(
    Lfm3,
    window=typed_window,
    turning=lambda config, layer: channels(config),
    rotary_per_type=True,
    attends=attends,
    states=short,
)
LFM2_MOE = replace(LFM2, rotary_module=lambda base, layer: base.pos_emb)
BAMBA = Architecture(Separate, attends=attends, states=bamba, restarts=True)
GRANITE_HYBRID = Architecture(
    Separate,
    scale=by_multiplier,
    rotates=lambda config, layer: config.position_embedding_type == "rope",
    attends=attends,
    states=bamba,
)
FALCON_H1 = Architecture(Multiplied, states=falcon_h1)
JAMBA = Architecture(Separate, rotates=never, attends=attends, states=mamba, restarts=True)
NEMOTRON_H = Architecture(Separate, attention="mixer", rotates=never, attends=attends, states=nemotron_h)
OLMO_HYBRID = Architecture(WidthNormed, rotates=has_base, attends=attends, states=delta)
KIMI_LINEAR = replace(MINICPM3, rotates=never, attends=attends, states=kimi_delta)
BAILING_HYBRID = replace(DEEPSEEK_V3, adapter=Bailing, attends=attends, states=kimi_delta)
ZAMBA = Architecture(
    Tied,
    attention="shared_transf.self_attn",
    scale=by_half,
    rotates=never,
    attends=hybrid,
    states=zamba,
    restarts=True,
)
ZAMBA2 = Architecture(
    Tied,
    attention="shared_transformer.self_attn",
    scale=by_half,
    rotates=lambda config, layer: bool(config.use_mem_rope),
    attends=hybrid,
    states=zamba2,
)
