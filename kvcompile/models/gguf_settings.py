"""Settings of a GGUF file that transformers' reader leaves out, so that a config would have its family's usual ones."""

from __future__ import annotations

import math
from typing import Any

from kvcompile.errors import KvcompileError

FIX = "use the safetensors checkpoint of this model"
# by their names in the file, behind that of its architecture: what configs call them
PLACES: dict[str, tuple[str, ...]] = {
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.key_length": ("head_dim",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
UNREAD = {  # model types of which transformers' reader takes a part
    "gemma4_text": "sizes that differ from layer to layer",
    "gpt_oss": "tensors of experts",
}
# gemma's files hold no scale of attention: llama.cpp divides by the width of a head, and in models of so many layers
# (their 27B) by hidden size over heads
BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}


def take_settings(settings: dict[str, Any], config: Any) -> None:
    """Set what a file says, `settings` by name without that of its architecture, in a config that differs, in place.

    Raises KvcompileError where transformers reads a part of what such a file holds.
    """
    kind = config.model_type
    if kind in UNREAD:
        raise KvcompileError(f"of a GGUF file of {kind!r} transformers does not read all", UNREAD[kind], FIX)
    if kind == "falcon" and settings.get("attention.head_count_kv", 1) != 1:
        got = f"{settings['attention.head_count_kv']}, whose rows it leaves in llama.cpp's order"
        raise KvcompileError("of GGUF files of 'falcon' transformers reads those with one key head", got, FIX)
    for setting, names in PLACES.items():
        value, place = settings.get(setting), next((name for name in names if hasattr(config, name)), None)
        if value is not None and place is not None and not _same(getattr(config, place), value):
            setattr(config, place, value)
    _take_turning(settings, config)
    if kind in BY_WIDTH:
        wide = config.num_hidden_layers == BY_WIDTH[kind]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if wide else config.head_dim


def _take_turning(settings: dict[str, Any], config: Any) -> None:
    """The base of rotary angles, of layers that slide if they have one, and how many channels of a head turn."""
    ropes = getattr(config, "rope_parameters", None) or {}
    rope = ropes.get("full_attention", ropes)
    for setting, of in (("rope.freq_base", rope), ("rope.freq_base_swa", ropes.get("sliding_attention", {}))):
        base = settings.get(setting)
        if base is not None and "rope_theta" in of and not _same(of["rope_theta"], base):
            of["rope_theta"] = float(base)
    turning = settings.get("rope.dimension_count")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if turning is not None and rope and int(head_dim * (rope.get("partial_rotary_factor") or 1.0)) != turning:
        rope["partial_rotary_factor"] = turning / head_dim


def _same(one: Any, other: Any) -> bool:
    """Up to the float32 of a file."""
    return isinstance(one, (int, float)) and math.isclose(one, other, rel_tol=1e-6)
