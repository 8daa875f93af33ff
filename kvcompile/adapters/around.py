"""Models of images and text whose text stack is compiled: where it stands, and how their tokens see each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


def no_layers(config: Any) -> str:
    """Every token sees those before it."""
    return ""


def all_layers(config: Any) -> str:
    """In all layers."""
    return "all"


def sliding_layers(config: Any) -> str:
    """In layers with a sliding window, where the config says so."""
    return "sliding" if _says_so(config) else ""


def where_it_says_so(config: Any) -> str:
    """In all layers, where the config says so."""
    return "all" if _says_so(config) else ""


def _says_so(config: Any) -> bool:
    return bool(config.get_text_config().use_bidirectional_attention == "vision")


class Around(NamedTuple):
    """stack: the text model, in the whole one. example: a checkpoint on the hub.

    masks: the model makes masks of its own, of padding masks. both_ways: by the config, the layers (`all`, `sliding`,
    none) in which tokens of one image see each other both ways. types: the argument that says which tokens these are.
    """

    stack: str
    example: str
    masks: bool = False
    both_ways: Callable[[Any], str] = no_layers
    types: str = "mm_token_type_ids"


AROUND: dict[str, Around] = {
    "gemma3": Around("model.language_model", "google/gemma-3-4b-it", True, all_layers, "token_type_ids"),
    "gemma3n": Around("model.language_model", "google/gemma-3n-E2B-it"),
    "gemma4": Around("model.language_model", "google/gemma-4-E2B-it", True, sliding_layers),
    "gemma4_unified": Around("model.language_model", "google/gemma-4-12B-it", True, where_it_says_so),
    "llama4": Around("language_model.model", "meta-llama/Llama-4-Scout-17B-16E-Instruct"),
    "llava": Around("model.language_model", "llava-hf/llava-1.5-7b-hf"),
    "mistral3": Around("model.language_model", "mistralai/Mistral-Small-3.1-24B-Instruct-2503"),
    "qwen2_5_vl": Around("model.language_model", "Qwen/Qwen2.5-VL-3B-Instruct"),
    "qwen3_5": Around("model.language_model", "Qwen/Qwen3.5-9B"),
    "qwen3_5_moe": Around("model.language_model", "Qwen/Qwen3.5-35B-A3B"),
    "qwen3_vl": Around("model.language_model", "Qwen/Qwen3-VL-2B-Instruct"),
    "qwen2_vl": Around("model.language_model", "Qwen/Qwen2-VL-2B-Instruct"),
}
INSIDE = {  # text stacks that stand alone nowhere
    "qwen2_5_vl_text": "llama:QWEN_VL",
    "qwen2_vl_text": "llama:QWEN_VL",
    "qwen3_vl_text": "qwen3:QWEN3_VL",
}
