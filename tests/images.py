"""Tiny seeded models of images and text, and what a processor would give them: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import TINY
from tiny import BASE, WINDOW
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.gemma3n import modeling_gemma3n

IMAGE, BEGIN, END = 5, 7, 8  # tokens
SIDE, PATCH, TOKENS = 28, 14, 4  # pixels of an image and of a patch, and how many patches there are
TEXT = {**BASE, "num_hidden_layers": 2}
SOUND = {
    "hidden_size": 32,
    "conf_num_attention_heads": 2,
    "conf_num_hidden_layers": 1,
    "vocab_size": 4,
    "vocab_offset": 132,
}
ONE_PATCH = {"patch_size": PATCH, "pooling_kernel_size": 1}
GRID = {
    **{k: v for k, v in TEXT.items() if k != "head_dim"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_EYES = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 1}
GEMMA4_EYES = {**EYES, "num_key_value_heads": 2, "head_dim": 16, "patch_size": PATCH, "pooling_kernel_size": 2}
LLAMA4_EYES = {
    "image_size": 2 * SIDE,  # of four patches a token is made
    "patch_size": PATCH,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "intermediate_size": 128,  # both of the encoder and of four patches together
}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
PARTS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]], dict[str, Any]]] = {
    "gemma3": (("gemma3_text", SLIDING), ("siglip_vision_model", {}), {"mm_tokens_per_image": TOKENS}),
    "gemma3n": (
        ("gemma3n_text", TINY["gemma3n_text"]),
        ("gemma3n_vision", {"hidden_size": 32, "vocab_offset": 128, "vocab_size": 4}),
        {"audio_config": SOUND, "vision_soft_tokens_per_image": TOKENS, "audio_token_id": 9},
    ),
    "gemma4": (
        ("gemma4_text", {**TINY["gemma4_text"], "use_bidirectional_attention": "vision"}),
        ("gemma4_vision", GEMMA4_EYES),
        {"video_token_id": 6, "audio_token_id": 9},
    ),
    "gemma4_unified": (
        ("gemma4_unified_text", TINY["gemma4_unified_text"]),
        ("gemma4_unified_vision", {"mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 4, **ONE_PATCH}),
        {"video_token_id": 6, "audio_token_id": 9},
    ),
    "llama4": (
        ("llama4_text", TINY["llama4_text"]),
        ("llama4_vision_model", {**EYES, **LLAMA4_EYES}),
        {},
    ),
    "llava": (("llama", {}), ("clip_vision_model", {}), {"vision_feature_layer": -1}),
    "mistral3": (
        ("mistral", {"sliding_window": None}),
        ("pixtral", {}),
        {"vision_feature_layer": -1, "spatial_merge_size": 1},
    ),
}
MERGED = {"hidden_size": 32, "out_hidden_size": 64, "num_position_embeddings": 16}
QWEN: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"hidden_size": 32, "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": SIDE},
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "qwen3_5": MERGED,
    "qwen3_5_moe": MERGED,
    "qwen3_vl": {**MERGED, "deepstack_visual_indexes": [0, 1]},
}
STATEFUL = ("qwen3_5", "qwen3_5_moe")  # layers that keep a state read a prompt at once
BOTH_WAYS = ("gemma3", "gemma4", "gemma4_unified")  # tokens of one image see each other, in one pass


def image_config(name: str, **text: Any) -> Any:
    """Config of a model whose text stack has 2 layers (or 4), hidden 64, 4 query and 2 KV heads of 16.

    text: other settings of its text stack.
    """
    if name in QWEN:
        tokens = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": BEGIN}
        eyes = {**QWEN_EYES, **QWEN[name]}
        if name != "qwen2_vl":
            eyes["intermediate_size"] = 64
        stack = {**TINY.get(f"{name}_text", {}), **GRID}
        return CONFIG_MAPPING[name](text_config=stack, vision_config=eyes, vision_end_token_id=END, **tokens)
    (stack_type, over), (eyes_type, eyes_over), others = PARTS[name]
    if eyes_type in ("clip_vision_model", "siglip_vision_model", "pixtral"):
        eyes_over = {**EYES, "image_size": SIDE, "patch_size": PATCH, **eyes_over}
    return CONFIG_MAPPING[name](
        text_config=CONFIG_MAPPING[stack_type](**{**TEXT, **over, **text}),
        vision_config=CONFIG_MAPPING[eyes_type](**eyes_over),
        image_token_id=IMAGE,
        **others,
    )


class Eyes(nn.Module):
    """A vector of 32 of each patch, in place of what gemma3n has from another package, timm."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, PATCH, PATCH)

    def forward(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        """`[images, 32, rows, columns]`."""
        return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values))


class WithoutTimm(AutoModel):
    """Models of text and sound, and those eyes."""

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Any:
        """The model of a config."""
        return Eyes() if config.model_type == "gemma3n_vision" else super().from_config(config, **options)


def image_model(name: str, **text: Any) -> PreTrainedModel:
    """The seeded model, fp32, in eval mode; norms and biases are random."""
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        if name == "gemma3n":
            patch.setattr(modeling_gemma3n, "AutoModel", WithoutTimm)
        model = AutoModelForImageTextToText.from_config(image_config(name, **text), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def image_inputs(name: str, batch: int = 1, tokens: int = 30) -> dict[str, Any]:
    """A prompt with an image in each sequence; in a batch the first is padded (not for llama4: it counts padding)."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 128, (batch, tokens), generator=draw)
    mask = torch.ones_like(ids)
    if batch > 1 and name != "llama4":
        mask[0, :2] = 0
    ids[:, 4 : 4 + TOKENS] = IMAGE
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if name in QWEN:
        ids[:, 3], ids[:, 4 + TOKENS] = BEGIN, END
        inputs["pixel_values"] = torch.randn(batch * TOKENS, 3 * 2 * PATCH * PATCH, generator=draw)
        inputs["image_grid_thw"] = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * batch)
    elif name.startswith("gemma4"):
        side = 2 if name == "gemma4_unified" else 4  # patches, of which gemma4 makes one token of four
        places = torch.tensor([[[x, y] for y in range(side) for x in range(side)]] * batch)
        patches = torch.randn(batch, side * side, 3 * PATCH * PATCH, generator=draw)
        inputs |= {"pixel_values": patches, "image_position_ids": places}
    else:
        side = 2 * SIDE if name == "llama4" else SIDE
        inputs["pixel_values"] = torch.randn(batch, 3, side, side, generator=draw)
    if name == "mistral3":
        inputs["image_sizes"] = torch.tensor([[SIDE, SIDE]] * batch)
    types = {"gemma3": "token_type_ids"}.get(name, "mm_token_type_ids")
    if name in QWEN or name in BOTH_WAYS:
        inputs[types] = (ids == IMAGE).long()
    return inputs


def text_inputs(name: str, batch: int = 1, tokens: int = 30) -> dict[str, Any]:
    """The same of text alone."""
    inputs = image_inputs(name, batch, tokens)
    inputs["input_ids"][inputs["input_ids"] < 10] += 15
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}
