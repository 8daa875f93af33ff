"""Tiny seeded models of every model type that is compiled, two layers each: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tiny import BASE, WINDOW
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SLIDES = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXED = {**EXPERTS, "mlp_layer_types": ["dense", "sparse"]}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
GRANITE = {"attention_multiplier": 0.1, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
BY_TYPE = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e5},
    }
}
GEMMA2 = {**SLIDES, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2}
MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
    "head_dim": None,
}
SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
    "num_kv_shared_layers": 2,
}
PER_LAYER = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ZAMBA = {
    "num_hidden_layers": 3,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    "num_key_value_heads": 4,
    "head_dim": None,
    "mamba_d_state": 8,
    "use_mamba_kernels": False,
}
# what a config needs to be tiny, and to use what is special about its family
TINY: dict[str, dict[str, Any]] = {
    "afmoe": {**SLIDES, **EXPERTS, "num_dense_layers": 1, "mup_enabled": True},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**MLA, **ROUTED, "n_shared_experts": 1},
    "bamba": {**MAMBA2, "attn_layer_indices": [1], "partial_rotary_factor": 0.5},
    "beam": {**SLIDES, **EXPERTS, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]},
    "bailing_hybrid": {
        **{key: value for key, value in MLA.items() if key != "q_lora_rank"},
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "bitnet": {"head_dim": None},
    "bloom": {"num_attention_heads": 6, "hidden_size": 96},
    "codegen": {"rotary_dim": 8, "n_ctx": 512},
    "cohere": {"use_qk_norm": True},
    "cohere2": SLIDES,
    "cohere2_moe": {**SLIDES, **EXPERTS, "mlp_layer_types": ["dense", "sparse"]},
    "cohere_compass_text": {
        **SLIDES,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": None,
        },
    },
    "cwm": SLIDES,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
    },
    "deepseek_v2": {**MLA, **ROUTED, "q_lora_rank": None, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v3": {**MLA, **ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots1": {**SLIDES, **ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1},
    "exaone4": SLIDES,
    "exaone_moe": {**SLIDES, **EXPERTS, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 128, "key_multiplier": 0.5},
    "flint": {**SLIDES, **EXPERTS},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma2": GEMMA2,
    "gemma3_text": {**SLIDES, "query_pre_attn_scalar": 24},
    "gemma3n_text": {
        **SHARED,
        **PER_LAYER,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {**SHARED, **PER_LAYER, "global_head_dim": 24},
    "gemma4_unified_text": {**SHARED, "global_head_dim": 24},
    "glm": HALF,
    "glm4": HALF,
    "glm4_moe_lite": {**MLA, **ROUTED, "n_shared_experts": 1},
    "glm4_moe": {**ROUTED, **HALF, "use_qk_norm": True, "first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["local", "global"], 1]], "window_size": WINDOW},
    "gpt_oss": {**SLIDES, **LOCAL},
    "granite": GRANITE,
    "granite_swa": {**GRANITE, **SLIDES, "layer_rope_theta": [1e4, 0.0]},
    "granitemoe_swa": {**GRANITE, **SLIDES, **LOCAL, "layer_rope_theta": [1e4, 1e5]},
    "granitemoe": {**GRANITE, **LOCAL},
    "granitemoehybrid": {
        **GRANITE,
        **LOCAL,
        **MAMBA2,
        "shared_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "position_embedding_type": "rope",
    },
    "granitemoeshared": {**GRANITE, **LOCAL, "shared_intermediate_size": 32},
    "gptj": {"rotary_dim": 8, "n_positions": 512},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v3": {**EXPERTS, "mlp_layer_types": ["dense", "sparse"]},
    "hyperclovax": GRANITE,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        **MLA,
        **MIXED,
        "q_lora_rank": None,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_heads": 2,
        "linear_head_dim": 8,
    },
    "kolibri1": {**SLIDES, **MIXED, "n_group": 1, "topk_group": 1},
    "laguna": {
        **SLIDES,
        **EXPERTS,
        **BY_TYPE,
        "num_attention_heads_per_layer": [4, 2],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {
        **LOCAL,
        "no_rope_layers": [1, 0],
        "attention_chunk_size": WINDOW,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "floor_scale": 8,
        "attn_scale": 0.5,
    },
    "longcat_flash": {
        **MLA,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
    },
    "lfm3": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
    },
    "mellum": {**SLIDES, **EXPERTS, **BY_TYPE},
    "mimo_v2_flash": {
        **SLIDES,
        **ROUTED,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "v_head_dim": 16,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "minicpm3": {**MLA, "dim_model_base": 32},
    "minimax_m2": {**LOCAL, **HALF},
    "ministral": SLIDES,
    "ministral3": {
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"sliding_window": WINDOW},
    "mixtral": LOCAL,
    "modernbert-decoder": SLIDES,
    "mpt": {"n_heads": 6, "hidden_size": 96, "attn_config": {"clip_qkv": 1.0}, "use_cache": True},
    "nemotron_h": {
        **ROUTED,
        "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
        "moe_shared_expert_intermediate_size": 32,
        "num_hidden_layers": 4,
        "n_shared_experts": 1,
    },
    "olmo": {"clip_qkv": 1.0},
    "olmo3": SLIDES,
    "olmo_hybrid": DELTA,
    "olmoe": {**EXPERTS, "clip_qkv": 1.0},
    "persimmon": HALF,
    "phi": {**HALF, "qk_layernorm": True},
    "phi3": {"sliding_window": WINDOW, "partial_rotary_factor": 0.5},
    "phimoe": LOCAL,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_moe_text": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": DELTA,
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32},
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": ROUTED,
    "stablelm": {"qk_layernorm": True},
    "starcoder2": {"sliding_window": WINDOW},
    "vaultgemma": GEMMA2,
    "youtu": MLA,
    "zamba": {**ZAMBA, "n_mamba_heads": 2, "mamba_dt_rank": 8},
    "zamba2": {
        **ZAMBA,
        "n_mamba_heads": 8,
        **{"use_shared_attention_adapter": True, "adapter_rank": 8, "use_mem_rope": True},
    },
}
ALIBI = {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "num_kv_heads": None}
# configs of a family that are another model than its first
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4_text (no norm)": ("llama4_text", {"use_qk_norm": False, "moe_layers": []}),
    "falcon (alibi)": ("falcon", {**ALIBI, "num_attention_heads": 6, "hidden_size": 144}),
}
EAGER = (
    "gemma2",
    "vaultgemma",
    "gpt_oss",
    "flint",
    "granite_swa",
    "granitemoe_swa",
    "mimo_v2_flash",
)  # SDPA of transformers knows neither soft-caps nor sinks
NO_KV_HEADS = (
    "bloom gpt_neox modernbert-decoder biogpt codegen dbrx falcon gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese "
    "gptj mpt opt persimmon xglm"
)


def family_config(name: str, window: int = WINDOW, full: bool = False, **over: Any) -> Any:
    """Config of a model of 2 layers, hidden 64, 4 query and 2 KV heads of 16, where the family can have those.

    full: layers do not slide where all of them would.
    """
    name, of_variant = VARIANTS.get(name, (name, {}))
    settings = {**BASE, "num_hidden_layers": 2, **TINY.get(name, {}), **of_variant, **over}
    for key in ("sliding_window", "window_size", "attention_chunk_size"):
        if settings.get(key):
            settings[key] = None if full and "layer_types" not in settings and key == "sliding_window" else window
    for dropped in ("num_key_value_heads", "head_dim") if name in NO_KV_HEADS.split() else ():
        del settings[dropped]
    unset = ("head_dim",) if settings.get("head_dim") is None else ()
    return CONFIG_MAPPING[name](**{key: value for key, value in settings.items() if key not in unset})


def family_model(name: str, window: int = WINDOW, full: bool = False, **over: Any) -> PreTrainedModel:
    """The seeded model, fp32, in eval mode; norms and biases are random, so that a test notices when one is dropped."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"attn_implementation": "eager"} if name in EAGER else {}
        config = family_config(name, window, full, **over)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
