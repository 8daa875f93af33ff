"""Models of images and text whose text stack is compiled: where it stands, and what of the model it cannot follow."""

from __future__ import annotations

from typing import NamedTuple


class Around(NamedTuple):
    """stack: the text model, in the whole one. example: a checkpoint on the hub.

    images: why images are refused (None: they are not). masks: the model makes masks of its own, of padding masks.
    """

    stack: str
    example: str
    images: str | None = None
    masks: bool = False


BOTH_WAYS = "tokens of one image see each other both ways"
AROUND: dict[str, Around] = {
    "gemma3": Around("model.language_model", "google/gemma-3-4b-it", BOTH_WAYS, masks=True),
    "llava": Around("model.language_model", "llava-hf/llava-1.5-7b-hf"),
    "mistral3": Around("model.language_model", "mistralai/Mistral-Small-3.1-24B-Instruct-2503"),
    "qwen2_5_vl": Around("model.language_model", "Qwen/Qwen2.5-VL-3B-Instruct"),
    "qwen3_vl": Around("model.language_model", "Qwen/Qwen3-VL-2B-Instruct", "its layers read images again (deepstack)"),
    "qwen2_vl": Around("model.language_model", "Qwen/Qwen2-VL-2B-Instruct"),
}
INSIDE = {  # text stacks that stand alone nowhere
    "qwen2_5_vl_text": "llama:QWEN_VL",
    "qwen2_vl_text": "llama:QWEN_VL",
    "qwen3_vl_text": "qwen3:QWEN3_VL",
}
