"""Low-rank training by `peft`: adapters beside the projections, merged into them at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from kvcompile.heal.optional import needed


def inject(model: nn.Module, names: Sequence[str], rank: int) -> None:
    """Put adapters of `rank` beside the Linear modules `names`, in place; only adapters are trainable then.

    W' = W + (alpha / r) B A, alpha = 2 r, B = 0 at first. Source: arXiv 2106.09685, equation 3.
    Raises KvcompileError without `peft`.
    """
    peft = needed("peft", "heal.weights=lora")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(names))
    peft.inject_adapter_in_model(config, model)


def merge(model: nn.Module) -> int:
    """Add every adapter to the weight it stands beside, which is changed in place; how many there were."""
    tuners: Any = needed("peft.tuners.tuners_utils", "heal.weights=lora")
    layers = [m for m in model.modules() if isinstance(m, tuners.BaseTunerLayer)]
    for layer in layers:
        layer.merge()
    return len(layers)
