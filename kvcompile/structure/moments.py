"""What calibration text says about each layer's attention: moments of its inputs, and how far back it looks."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.adapters.architectures import architecture_of
from kvcompile.adapters.layout import Layout, Projection, Weights
from kvcompile.kernels.reference import softmax
from kvcompile.plan.plan import LayerPlan, Plan

WINDOW = 512  # tokens that the text is read in at a time

_kept: weakref.WeakKeyDictionary[nn.Module, tuple[Tensor, list[Moments]]] = weakref.WeakKeyDictionary()


@dataclass
class Moments:
    """Of one layer over a text, float64, with h' = [h; 1] the input of a token: `asking [hidden + 1, hidden + 1]`,
    E[h' h'^T] over the tokens that ask; `answering`, the same over those that attention looks at (each weighted by the
    attention that it receives, so that sinks count for what they are); `turn [D_rot / 2]`, complex, the mean of
    exp(-i theta_f distance) from the one to the other.
    """

    asking: Tensor
    answering: Tensor
    turn: Tensor

    @property
    def covariance(self) -> Tensor:
        """Of `answering`, bordered by zeros."""
        mean = self.answering[-1]
        return self.answering - mean.outer(mean)


def moments(model: Any, plan: Plan, ids: Tensor, keep: bool = False) -> list[Moments]:
    """`Moments` of every layer of an uncompiled model over `ids [1, n]`, read in windows of `WINDOW` tokens.

    keep: for one more question about the same text: first a plan is made with them, then weights are.
    """
    last = _kept.pop(model, None)
    result = last[1] if last is not None and torch.equal(last[0], ids) else _measured(model, plan, ids)
    if keep:
        _kept[model] = ids, result
    return result


@torch.no_grad()
def _measured(model: Any, plan: Plan, ids: Tensor) -> list[Moments]:
    architecture = architecture_of(model.config)
    layouts = architecture.layouts(model, plan)
    watchers = [
        _Watcher(layout, p, architecture.rotary(model, p.index)) for layout, p in zip(layouts, plan.layers, strict=True)
    ]
    hooks = [
        layout.attention.register_forward_pre_hook(watcher, with_kwargs=True)
        for layout, watcher in zip(layouts, watchers, strict=True)
    ]
    try:
        for window in torch.split(ids, WINDOW, 1):
            model(window.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return [watcher.result() for watcher in watchers]


class _Watcher:
    """A hook before one attention: sums what `Moments` are means of."""

    def __init__(self, layout: Layout, p: LayerPlan, rotation: Any) -> None:
        self.weights: Weights = layout.read()
        self.plan, self.rotation = p, rotation
        self.sums: list[Tensor] = []
        self.tokens = 0

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = (args[0] if args else kwargs["hidden_states"])[0].float()
        extended = torch.cat((hidden, hidden.new_ones(hidden.shape[0], 1)), 1)
        column_sums, turn = self._attention(hidden)
        new = [extended.T @ extended, extended.T @ (extended * column_sums.unsqueeze(1)), turn]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.tokens += hidden.shape[0]

    def result(self) -> Moments:
        """The means."""
        asking, answering, turn = (x.cpu() / self.tokens for x in self.sums)
        return Moments(asking.double(), answering.double(), turn.to(torch.complex128))

    def _attention(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What each token receives, mean over heads, `[n]`; sum over queries of the mean of exp(-i theta distance)."""
        count, p = hidden.shape[0], self.plan
        keys, _ = self.weights.own
        cos, sin = self.rotation(torch.arange(count, device=hidden.device, dtype=torch.int64))
        half = cos.shape[-1] // 2
        table = torch.complex(cos[:, :half], -sin[:, :half])
        column_sums, seen = (torch.zeros(count, device=hidden.device, dtype=torch.float32) for _ in range(2))
        i = torch.arange(count, device=hidden.device, dtype=torch.int64)
        distance = i.unsqueeze(1) - i
        hidden_from = (distance < 0) | (distance >= (p.sliding_window or count))
        for head in range(p.query_heads):
            query = _head(self.weights.query, head, hidden)
            key = _head(keys, head // (p.query_heads // len(keys.weight)), hidden)
            logits = _turned(query, cos, sin) @ _turned(key, cos, sin).T * p.scale
            if p.softcap:
                logits = p.softcap * torch.tanh(logits / p.softcap)
            sink = None if self.weights.sinks is None else self.weights.sinks[head]
            weights = softmax(logits.masked_fill(hidden_from, float("-inf")), sink)
            seen.index_add_(0, distance.clamp(min=0).flatten(), weights.flatten())
            column_sums += weights.sum(0)
        return column_sums / p.query_heads, (seen / p.query_heads).to(table.dtype) @ table / table[0].abs()


def _head(part: Projection, head: int, hidden: Tensor) -> Tensor:
    weight, bias = part.weight[head].float(), None if part.bias is None else part.bias[head].float()
    return torch.nn.functional.linear(hidden, weight, bias)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    first, second = x[:, :width].chunk(2, -1)
    return torch.cat((x[:, :width] * cos + torch.cat((-second, first), -1) * sin, x[:, width:]), -1)
