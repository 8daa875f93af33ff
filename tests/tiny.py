"""Tiny seeded models of every supported architecture, for all tests: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvcompile.adapters.architectures import architecture_of, describe
from kvcompile.adapters.layout import Layout

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough for attention to differ between tokens
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 16
ALTERNATING = ["sliding_attention", "full_attention"] * 2
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "olmo2": {},
    "granite": {
        "attention_multiplier": 0.1,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": WINDOW},
    "gemma2": {
        "sliding_window": WINDOW,
        "layer_types": ALTERNATING,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ALTERNATING, "query_pre_attn_scalar": 24},
    "gpt_neox": {},
    "gpt_oss": {
        "initializer_range": 0.15,  # experts multiply gate and up: logits, and their rounding, grow with its cube
        "sliding_window": WINDOW,
        "layer_types": ALTERNATING,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
}
ARCHITECTURES = tuple(EXTRA)


def tiny_config(name: str, **over: Any) -> Any:
    """Config of a model of 4 layers, hidden 64, 4 query and 2 KV heads of 16 (gpt_neox: 4 and 4)."""
    settings = {**BASE, **EXTRA[name], **over}
    if name == "gpt_neox":
        del settings["num_key_value_heads"], settings["head_dim"]
    return CONFIG_MAPPING[name](**settings)


def tiny_model(name: str = "llama", **over: Any) -> PreTrainedModel:
    """The seeded model, fp32, in eval mode; norms and biases are random, so that a test notices when one is dropped."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # up to transformers 5.17 at least, SDPA silently drops gemma2's soft-cap: only eager is the true reference
        options = {"attn_implementation": "eager"} if name in ("gemma2", "gpt_oss") else {}
        model = AutoModelForCausalLM.from_config(tiny_config(name, **over), dtype=torch.float32, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: `pad bos eos unk` and `w4`..`w127`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, BASE["vocab_size"]))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Seeded token ids `[batch, tokens]`, none of them special."""
    return torch.randint(4, BASE["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))


def attentions(model: Any) -> list[Any]:
    """The attention modules of a model, by layer."""
    return list(architecture_of(model.config).attentions(model))


def layouts(model: Any) -> list[Layout]:
    """The projections of an unconverted model, by layer."""
    return architecture_of(model.config).layouts(model, describe(model.config))


def rotary(model: Any, layer: int) -> Any:
    """The rotation of a layer, as policies ask for it."""
    return architecture_of(model.config).rotary(model, layer)
