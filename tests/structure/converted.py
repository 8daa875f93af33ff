"""Models whose heads are copies of each other, and models of transformers that share layers: oracles of conversions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from tiny import layouts, tiny_ids, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from kvcompile.adapters.architectures import describe
from kvcompile.adapters.layout import Weights
from kvcompile.build import build
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import Plan
from kvcompile.stack import apply_stack, build_stack

Stack = dict[str, dict[str, Any]]
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}  # 4 KV heads of 2 query heads


def planned(model: Any, stack: Stack) -> Plan:
    """The checked plan of a stack on a model."""
    return apply_stack(describe(model.config), build_stack(list(stack), stack))


def converted(model: Any, stack: Stack, text: Tensor | None = None, kernels: str = "sdpa") -> Any:
    """A compiled copy of the model; the model stays as it is. Policies that calibrate get the given text.

    Conversions change weights: attention is the library's by default, and no compiler runs.
    """
    from kvcompile.structure.convert import convert

    copy, plan = shared(model), planned(model, stack)
    convert(copy, plan, text)
    return build(copy, plan, kernels)


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(tiny_ids(2, 40) if ids is None else ids).logits


def edit(model: Any, change: Any) -> Any:
    """The model with `change(Weights) -> Weights` applied to every attention, in place."""
    plan = describe(model.config)
    for layout, p in zip(layouts(model), plan.layers, strict=True):
        for name, module in layout.write(change(layout.read(), p)).items():
            setattr(layout.attention, name, module)
    return model


def copied(model: Any, like: list[int]) -> Any:
    """The model with KV head h replaced by a copy of head `like[h]`."""

    def change(w: Weights, p: Any) -> Weights:
        return Weights(w.query, w.key.map(lambda x: x[like]), w.value.map(lambda x: x[like]), w.out, w.head_norm)

    return edit(model, change)


class SharingCache(DynamicCache):
    """transformers' cache in which layer i gets the keys and values of layer `owners[i]`."""

    def __init__(self, config: Any, owners: list[int]) -> None:
        super().__init__(config=config)
        self.owners = owners
        self.now: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.now[layer_idx] = super().update(keys, values, layer_idx, *args, **kwargs)
        return self.now[self.owners[layer_idx]]


def sharing(model: Any, owners: list[int], ids: Tensor, mask: Tensor, prompt: int) -> Tensor:
    """Logits of a prefill and of single steps, by transformers' own attention over a `SharingCache`."""
    cache, out = SharingCache(model.config, owners), []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cuts = [0, prompt, *range(prompt + 1, ids.shape[1] + 1)]
    with torch.no_grad():
        for a, b in pairwise(cuts):
            step = model(
                ids[:, a:b],
                attention_mask=mask[:, :b],
                position_ids=positions[:, a:b],
                past_key_values=cache,
                use_cache=True,
            )
            out.append(step.logits)
    return torch.cat(out, 1)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


__all__ = [
    "WIDE",
    "Stack",
    "converted",
    "copied",
    "edit",
    "logits",
    "parameters",
    "planned",
    "sharing",
    "tiny_model",
    "tiny_tokenizer",
]
