"""Tiny seeded models of images and text, and what a processor would give them: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tiny import BASE, WINDOW
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

IMAGE, BEGIN, END = 5, 7, 8  # tokens
SIDE, PATCH, TOKENS = 28, 14, 4  # pixels of an image and of a patch, and how many patches there are
TEXT = {**BASE, "num_hidden_layers": 2}
GRID = {
    **{k: v for k, v in TEXT.items() if k != "head_dim"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_EYES = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 1}
PARTS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]], dict[str, Any]]] = {
    "gemma3": (
        ("gemma3_text", {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
        ("siglip_vision_model", {}),
        {"mm_tokens_per_image": TOKENS},
    ),
    "llava": (("llama", {}), ("clip_vision_model", {}), {"vision_feature_layer": -1}),
    "mistral3": (
        ("mistral", {"sliding_window": None}),
        ("pixtral", {}),
        {"vision_feature_layer": -1, "spatial_merge_size": 1},
    ),
}
QWEN: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"hidden_size": 32, "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": SIDE},
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "qwen3_vl": {
        "hidden_size": 32,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    },
}
SEEING = ("llava", "mistral3", "qwen2_5_vl", "qwen2_vl")  # the others are compiled for text


def image_config(name: str) -> Any:
    """Config of a model whose text stack has 2 layers, hidden 64, 4 query and 2 KV heads of 16."""
    if name in QWEN:
        tokens = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": BEGIN}
        eyes = {**QWEN_EYES, **QWEN[name]}
        if name != "qwen2_vl":
            eyes["intermediate_size"] = 64
        return CONFIG_MAPPING[name](text_config=GRID, vision_config=eyes, vision_end_token_id=END, **tokens)
    (text, over), (eyes_type, eyes_over), others = PARTS[name]
    eyes = {**EYES, "image_size": SIDE, "patch_size": PATCH, **eyes_over}
    return CONFIG_MAPPING[name](
        text_config=CONFIG_MAPPING[text](**{**TEXT, **over}),
        vision_config=CONFIG_MAPPING[eyes_type](**eyes),
        image_token_id=IMAGE,
        **others,
    )


def image_model(name: str) -> PreTrainedModel:
    """The seeded model, fp32, in eval mode; norms and biases are random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(image_config(name), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def image_inputs(name: str, batch: int = 1, tokens: int = 30) -> dict[str, Tensor]:
    """A prompt, with an image in each sequence where the model is compiled for them; in a batch the first is padded."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 128, (batch, tokens), generator=draw)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name not in SEEING:
        return inputs
    ids[:, 4 : 4 + TOKENS] = IMAGE
    if name in QWEN:
        ids[:, 3], ids[:, 4 + TOKENS] = BEGIN, END
        inputs["pixel_values"] = torch.randn(batch * TOKENS, 3 * 2 * PATCH * PATCH, generator=draw)
        inputs["image_grid_thw"] = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * batch)
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    else:
        inputs["pixel_values"] = torch.randn(batch, 3, SIDE, SIDE, generator=draw)
        if name == "mistral3":
            inputs["image_sizes"] = torch.tensor([[SIDE, SIDE]] * batch)
    return inputs
