"""How a compiled model decodes a token: by a graph of fused kernels, as long as what these stand for is unchanged.

A decode step is one new token of each sequence behind a prompt. Its graph is the compiled one with kernels around the
attention of the layers; prompts, gradients, autocast, traces and everything else run the modules' own forwards. Kernels
keep addresses of weights: whether modules, hooks and weights are as they were is looked at before every step, and the
graph is made anew where they are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as hooks

from kvcompile.kernels.layers import MOST_ROWS
from kvcompile.runtime.cache import KVCache
from kvcompile.runtime.decode.watch import Watch
from kvcompile.runtime.live import LiveGraph


@dataclass(frozen=True)
class Steps:
    """The graph of a decode step (None: there are no kernels for this model), and what it stands for.

    places: halves of layers that run as kernels; refused: why others do not, and in which layers.
    """

    graph: LiveGraph | None
    watch: Watch
    places: int
    refused: dict[str, list[int]]

    def describe(self) -> str:
        """For reports: what runs as kernels, and what does not, and why."""
        reasons = [f"layers {_ranges(sorted({*layers}))}: {reason}" for reason, layers in self.refused.items()]
        return "; ".join([f"{self.places} fused kernels a token", *reasons])


class FusedSteps:
    """The decode steps of one model, made when they are first wanted and whenever the model has changed."""

    def __init__(self, make: Callable[[LiveGraph], Steps]) -> None:
        self.make = make
        self.steps: Steps | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedSteps:
        """Those of the copy, which has weights of its own."""
        return FusedSteps(self.make)

    def of(self, whole: LiveGraph) -> Steps:
        """What stands for the modules of a graph as they are now."""
        steps = self.steps
        if steps is None or not steps.watch.unchanged():
            steps = self.steps = self.make(whole)
        return steps

    def graph(self, whole: LiveGraph, tokens: Tensor, cache: KVCache) -> LiveGraph | None:
        """The graph for these new tokens `[B, Q]`; None where they run through the modules of the `whole` one."""
        if tokens.ndim != 2 or tokens.shape[1] != 1 or not 0 < tokens.shape[0] <= MOST_ROWS or not tokens.is_cpu:
            return None
        if torch.is_grad_enabled() or cache.prompting or not any(cache.seen) or whole.model.training:
            return None
        return None if _watched() else self.of(whole).graph


def _watched() -> bool:
    """Whether modules are to run as such: under autocast or a trace, or where a hook is to fire at all of them."""
    if torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return True
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def _ranges(layers: list[int]) -> str:
    """`0-3, 5`."""
    ends: list[tuple[int, int]] = []
    for layer in layers:
        if ends and ends[-1][1] == layer - 1:
            ends[-1] = ends[-1][0], layer
        else:
            ends.append((layer, layer))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
