"""What the tests of exported programs share: tiny compiled models, stepped greedily."""

from __future__ import annotations

import re
from typing import Any

import torch
from tiny import tiny_config, tiny_model, tiny_tokenizer
from torch import Tensor

import kvcompile
from kvcompile.build import plan_of
from kvcompile.config.compose import compose
from kvcompile.plan.plan import Plan


def compiled(architecture: str, overrides: list[str], **over: Any) -> Any:
    """A tiny compiled model; programs have kernels of their own, so it runs the library's."""
    return kvcompile.compile(
        tiny_model(architecture, **over), overrides=["kernels=sdpa", *overrides], tokenizer=tiny_tokenizer()
    )


def planned(architecture: str, overrides: list[str], dtype: str = "float32") -> tuple[Plan, Any]:
    """The plan of a stack on a tiny model, and the model's config."""
    config, original = compose(overrides), tiny_config(architecture)
    return plan_of(original, dtype, config, config.policies()), original


def code(usage: str, language: str = "python") -> str:
    """The block of an exporter's usage in one language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", usage, re.S)
    return str(found)


@torch.no_grad()
def stepped(model: Any, ids: Tensor, count: int) -> tuple[Tensor, list[list[int]]]:
    """Logits `[B, count + 1, vocabulary]` of greedy decoding; entries that the prompt left, by layer and row."""
    out = model(ids)
    cache, logits = out.past_key_values, [out.logits[:, -1]]
    kept = [lengths for lengths in cache.lengths() if lengths]
    for _ in range(count):
        logits.append(model(logits[-1].argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1])
    return torch.stack(logits, 1), kept
