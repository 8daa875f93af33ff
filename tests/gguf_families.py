"""GGUF files of tiny models of many families: names, order of weights and settings as llama.cpp has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import family_model
from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import quantize
from torch import Tensor

THETA = 5e4  # no family's own
GEMMA = {"query_pre_attn_scalar": 32, "rms_norm_eps": 1e-3}
GEMMA3 = {
    "num_hidden_layers": 6,
    "layer_types": None,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "rope_theta": THETA, "factor": 8.0},
    },
}
FALCON = {"new_decoder_architecture": False, "num_kv_heads": 1, "layer_norm_epsilon": 1e-3}
MROPE = {
    "rope_type": "default",
    "rope_theta": 5e4,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
    "partial_rotary_factor": 0.25,
}


def share(of: float) -> dict[str, Any]:
    """That part of the channels of a head turns."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": of}}


WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}  # rows that blocks of Q8_0 divide
KINDS = {"F16": GGMLQuantizationType.F16, "Q8_0": GGMLQuantizationType.Q8_0, "F32": GGMLQuantizationType.F32}
Weights = list[tuple[str, Tensor]]


def as_they_are(config: Any, name: str, weight: Tensor) -> Weights:
    return [(name, weight)]


def norms_from_one(config: Any, name: str, weight: Tensor) -> Weights:
    """Norms that multiply by 1 + w are stored as 1 + w."""
    return [(name, weight + 1 if name.endswith("norm.weight") else weight)]


def transposed(config: Any, name: str, weight: Tensor) -> Weights:
    """gpt2 keeps its matrices as inputs x outputs."""
    matrix = weight.dim() == 2 and name.startswith("blk.")
    return [(name, weight.T if matrix else weight)]


def bloom_parts(config: Any, name: str, weight: Tensor) -> Weights:
    """Rows of q, k and v of each head in turn become those of all heads."""
    if "attn_qkv" not in name:
        return [(name, weight)]
    by_head = torch.unflatten(weight, 0, (config.n_head, 3, -1))
    return [(name, by_head.transpose(0, 1).flatten(0, 2))]


def falcon_parts(config: Any, name: str, weight: Tensor) -> Weights:
    """Rows of the queries, the key and the value of each group become those of all queries, keys and values."""
    if "attn_qkv" not in name:
        return [(name, weight)]
    groups = config.num_kv_heads if config.new_decoder_architecture else 1
    rows = torch.unflatten(weight, 0, (groups, -1, config.hidden_size // config.num_attention_heads))
    return [(name, torch.cat([rows[:, :-2].flatten(0, 2), rows[:, -2].flatten(0, 1), rows[:, -1].flatten(0, 1)]))]


def experts_apart(config: Any, name: str, weight: Tensor) -> Weights:
    """Gates and ups of all experts in a tensor each; the gate of the shared expert is a vector."""
    if name.endswith("gate_up_proj"):
        gate, up = weight.chunk(2, 1)
        block = name.split(".")[2]
        return [(f"blk.{block}.ffn_gate_exps.weight", gate), (f"blk.{block}.ffn_up_exps.weight", up)]
    if name.endswith("e_score_correction_bias"):
        return [(f"blk.{name.split('.')[2]}.exp_probs_b.bias", weight)]
    return [(name, weight.squeeze(0) if "ffn_gate_inp_shexp" in name else weight)]


def convolutions_flat(config: Any, name: str, weight: Tensor) -> Weights:
    """`[channels, 1, kernel]` as `[channels, kernel]`."""
    return [(name, weight.squeeze(1) if "shortconv.conv" in name else weight)]


def tiled(config: Any, weight: Tensor, width: int = 1) -> Tensor:
    """Rows of value heads, those of each key head together, as the first of each, then the second of each ..."""
    keys = config.linear_num_key_heads
    by_head = torch.unflatten(weight, 0, (keys, config.linear_num_value_heads // keys, width))
    return by_head.transpose(0, 1).flatten(0, 2)


def delta_parts(config: Any, name: str, weight: Tensor) -> Weights:
    """qwen3_5: norms from one, decays as -exp, value heads in another order."""
    width, keys = config.linear_value_head_dim, 2 * config.linear_num_key_heads * config.linear_key_head_dim
    if name.endswith("norm.weight") and "ssm_norm" not in name:
        weight = weight + 1
    elif "ssm_a" in name and "alpha" not in name:
        weight = tiled(config, -weight.exp())
    elif name.endswith("dt_bias"):
        name, weight = f"blk.{name.split('.')[2]}.ssm_dt.bias", tiled(config, weight)
    elif "ssm_alpha" in name or "ssm_beta" in name:
        weight = tiled(config, weight)
    elif "attn_gate" in name:
        weight = tiled(config, weight, width)
    elif "attn_qkv" in name or "ssm_conv1d" in name:
        weight = torch.cat((weight[:keys], tiled(config, weight[keys:], width)))
        weight = weight.squeeze(1) if "conv1d" in name else weight
    elif "ssm_out" in name:
        weight = tiled(config, weight.T, width).T
    return [(name, weight)]


def gpt_oss_experts(config: Any, name: str, weight: Tensor) -> Weights:
    """Gates and ups, which alternate, in a tensor each, as outputs x inputs."""
    block = name.split(".")[2] if name.startswith("model.layers") else name.split(".")[min(1, name.count("."))]
    if "gate_up_proj" in name:
        end = "bias" if name.endswith("bias") else "weight"
        parts = (weight[..., 0::2], weight[..., 1::2])
        gate, up = parts if end == "bias" else tuple(part.transpose(1, 2) for part in parts)
        return [(f"blk.{block}.ffn_gate_exps.{end}", gate), (f"blk.{block}.ffn_up_exps.{end}", up)]
    if "down_proj" in name:
        down = weight if name.endswith("bias") else weight.transpose(1, 2)
        return [(f"blk.{block}.ffn_down_exps.{'bias' if name.endswith('bias') else 'weight'}", down)]
    return [(f"blk.{block}.attn_sinks.weight" if name.endswith("sinks") else name, weight)]


@dataclass(frozen=True)
class Family:
    """arch: its name in GGUF. over: what of a tiny config. facts: settings beside the usual ones.

    weights: what stands in the file for one, by its name there.
    """

    arch: str
    over: dict[str, Any] = field(default_factory=dict)
    facts: Callable[[Any], dict[str, Any]] = lambda config: {}
    weights: Callable[[Any, str, Tensor], Weights] = as_they_are


def partial(config: Any) -> dict[str, Any]:
    share = config.rope_parameters["partial_rotary_factor"]
    return {"rope.dimension_count": int(share * (config.hidden_size // config.num_attention_heads))}


def expert_facts(config: Any) -> dict[str, Any]:
    shared = getattr(config, "shared_expert_intermediate_size", None)
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        **({"expert_shared_feed_forward_length": shared} if shared else {}),
    }


def phi_facts(config: Any) -> dict[str, Any]:
    most = config.max_position_embeddings
    return {
        **partial(config),
        "attention.sliding_window": config.sliding_window,
        "rope.scaling.original_context_length": most,
    }


def lfm2_facts(config: Any) -> dict[str, Any]:
    counts = [config.num_key_value_heads if of == "full_attention" else 0 for of in config.layer_types]
    return {
        "attention.head_count_kv": counts,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "shortconv.l_cache": config.conv_L_cache,
    }


def delta_facts(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return {
        "full_attention_interval": 2,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "rope.dimension_sections": [2, 1, 1, 0],
        "rope.dimension_count": int(config.head_dim * rope["partial_rotary_factor"]),
    }


def minimax_facts(config: Any) -> dict[str, Any]:
    return {
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_gating_func": 2,
        **partial(config),
    }


def gpt_oss_facts(config: Any) -> dict[str, Any]:
    return {
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "attention.sliding_window": config.sliding_window,
    }


def gemma_facts(config: Any) -> dict[str, Any]:
    caps = {name: getattr(config, name, None) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    scaled = linear if config.model_type == "gemma3_text" else {}
    return {"attention.sliding_window": config.sliding_window, **{k: v for k, v in caps.items() if v}, **scaled}


FAMILIES: dict[str, Family] = {
    "bloom": Family("bloom", {"hidden_size": 192, "layer_norm_epsilon": 1e-3}, weights=bloom_parts),
    "falcon": Family("falcon", FALCON, weights=falcon_parts),
    "gemma2": Family("gemma2", {**GEMMA, "final_logit_softcapping": 7.0}, gemma_facts, norms_from_one),
    "gemma3_text": Family("gemma3", {**GEMMA, **GEMMA3}, gemma_facts, norms_from_one),
    "gpt2": Family("gpt2", {"layer_norm_epsilon": 1e-3}, weights=transposed),
    "gpt_oss": Family("gpt-oss", {"window": 128}, gpt_oss_facts, gpt_oss_experts),
    "lfm2": Family("lfm2", {"norm_eps": 1e-3}, lfm2_facts, convolutions_flat),
    "minimax_m2": Family("minimax-m2", {"rms_norm_eps": 1e-3}, minimax_facts, experts_apart),
    "nemotron": Family("nemotron", {**share(0.25), "norm_eps": 1e-3}, partial, norms_from_one),
    "phi3": Family("phi3", share(0.5), phi_facts),
    "qwen2_moe": Family("qwen2moe", {**share(1.0), "rms_norm_eps": 1e-3}, expert_facts, experts_apart),
    "qwen3": Family("qwen3", {**share(1.0), "rms_norm_eps": 1e-3}),
    "qwen3_5_text": Family("qwen35", {"rope_parameters": MROPE}, delta_facts, delta_parts),
    "qwen3_moe": Family("qwen3moe", {**share(1.0), "norm_topk_prob": True}, expert_facts, experts_apart),
    "stablelm": Family("stablelm", {**share(0.5), "qk_layernorm": False, "use_qkv_bias": True}, partial),
    "starcoder2": Family("starcoder2", {**share(1.0), "norm_epsilon": 1e-3, "sliding_window": None}),
}


def common(config: Any) -> dict[str, Any]:
    """Settings that every file has, under the names of the families' configs."""
    first = lambda *names: next((v for v in (getattr(config, n, None) for n in names) if v is not None), None)  # noqa: E731
    hidden, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
    ropes = getattr(config, "rope_parameters", None) or {}
    facts = {
        "block_count": first("num_hidden_layers", "n_layer"),
        "context_length": first("max_position_embeddings", "n_positions"),
        "embedding_length": hidden,
        "feed_forward_length": first("intermediate_size", "n_inner", "ffn_hidden_size") or 4 * hidden,
        "attention.head_count": heads,
        "attention.head_count_kv": first("num_key_value_heads", "num_kv_heads"),
        "attention.key_length": first("head_dim"),
        "attention.value_length": first("head_dim"),
        "attention.layer_norm_epsilon": first("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
        "attention.layer_norm_rms_epsilon": first("rms_norm_eps"),
        "rope.freq_base": ropes.get("rope_theta") or ropes.get("full_attention", {}).get("rope_theta"),
        "vocab_size": config.vocab_size,
    }
    return {key: value for key, value in facts.items() if value is not None}


def tensors(model: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    number = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[family.arch]
    names = get_tensor_name_map(number, model.config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for key, weight in model.state_dict().items():
        if tied and key == "lm_head.weight":
            continue
        called = key.removeprefix("transformer.") if family.arch == "bloom" else key
        name = names.get_name(called, (".weight", ".bias")) or called
        yield from family.weights(model.config, name, weight.detach().float())


def write(model: Any, path: Path, kind: str = "F16", arch: str = "", **changes: Any) -> None:
    """Write a model of a family to a file, under another name (`arch`), or with `changes` of settings."""
    config = model.config
    family = FAMILIES[config.model_type]
    called = arch or family.arch
    writer = GGUFWriter(path, called)
    add_words(writer, config)
    add: dict[type, Any] = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in {**common(config), **family.facts(config), **changes}.items():
        add.get(type(value), writer.add_array)(f"{called}.{key}", value)
    for name, weight in tensors(model, family):
        of = KINDS[kind] if weight.dim() > 1 and weight.shape[-1] % 32 == 0 else GGMLQuantizationType.F32
        numbers = weight.contiguous().numpy()
        writer.add_tensor(name, quantize(numbers, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_words(writer: GGUFWriter, config: Any) -> None:
    """A byte-level vocabulary of as many words as there are embeddings."""
    words = ["<unk>", "<s>", "</s>", *(chr(ord("a") + i) for i in range(26)), "ab"]
    words += [f"w{i}" for i in range(config.vocab_size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def wide_model(name: str, **over: Any) -> Any:
    """The tiny model of a family, with rows as long as blocks want them."""
    return family_model(name, **{**WIDE, **FAMILIES[name].over, **over})
