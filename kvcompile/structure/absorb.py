"""From factorised keys and values to modules: what a layer has in place of its key and value projections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture
from kvcompile.adapters.architectures import architecture_of
from kvcompile.adapters.latent import Latent as Module
from kvcompile.adapters.layout import Layout, Weights, linear_like, plain
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.structure import Latent
from kvcompile.structure.latent import Factors, components, decompose
from kvcompile.structure.moments import moments
from kvcompile.structure.precision import precise


@torch.no_grad()
def factorise(architecture: Architecture, model: Any, plan: Plan, text: Tensor | None) -> dict[int, Factors]:
    """`Factors` of the layers that get a latent. text: token ids `[1, n]`, wanted where activations decide.

    Raises KvcompileError without such a text, and for a rank that no layer of this width has.
    """
    latents = [(p, p.latent) for p in plan.layers if p.latent is not None]
    if not latents:
        return {}
    tokens = max(how.tokens for _, how in latents)
    if tokens and text is None:
        raise KvcompileError(
            "stack.mla is fitted to text", "no tokenizer to read it", "pass tokenizer=, or stack.mla.factor=weights"
        )
    seen = moments(model, plan, text[:, :tokens]) if tokens and text is not None else None
    factors, layouts = {}, architecture.layouts(model, plan)
    for p, how in latents:
        weights = layouts[p.index].read()
        amplitude = _amplitude(architecture, model, p)
        decomposed = decompose(weights, p, how, seen[p.index] if seen else None, amplitude)
        _require_rank(p, how, decomposed.singular.shape[0])
        factors[p.index] = decomposed.factors(how.rank, _biased(weights))
    return factors


@torch.no_grad()
def calibrate(
    model: Any, plan: Plan, ids: Tensor, by: str | None, energy: float | None
) -> tuple[list[int], list[list[int]]]:
    """Per layer the rank that holds a share of the `energy`, and the frequencies that keep their position.

    plan: with latents of the wanted sizes. by: `norm` or `position` (None: frequencies as planned); energy: None for
    ranks as planned. What is not asked for comes back empty.
    """
    ranks, frequencies, architecture = [], [], architecture_of(model.config)
    layouts = architecture.layouts(model, plan)
    for p, layout, seen in zip(plan.layers, layouts, moments(model, plan, ids, keep=True), strict=True):
        weights, how = layout.read(), p.latent
        if how is None:
            raise ValueError(f"layer {p.index} has no latent")
        if by is not None:
            parts = components(weights, p, seen.asking, seen.answering, how.mix)
            best = parts.best(len(how.frequencies), seen.turn if by == "position" else None)
            frequencies.append(list(best))
            how = replace(how, frequencies=best)
        if energy is not None:
            fitted = seen if how.factor == "activations" else None
            ranks.append(decompose(weights, p, how, fitted, _amplitude(architecture, model, p)).rank(energy))
    return ranks, frequencies


def _amplitude(architecture: Architecture, model: Any, p: LayerPlan) -> float:
    """By how much the layer's RoPE stretches what it turns. Raises KvcompileError where it turns something else."""
    cos, _ = architecture.rotary(model, p.index)(torch.zeros(1, dtype=torch.long, device=model.device))
    if p.rotates and cos.shape[-1] != p.rotary:
        raise KvcompileError(f"layer {p.index}: RoPE must turn {p.rotary} channels of a head", cos.shape[-1])
    return float(cos[0, 0]) if p.rotates else 1.0


def _require_rank(p: LayerPlan, how: Latent, most: int) -> None:
    if how.rank > most:
        raise KvcompileError(
            f"stack.mla: rank must be at most {most}, what keys and values of layer {p.index} are made of", how.rank
        )


def modules_of(layout: Layout, weights: Weights, p: LayerPlan, factors: Factors | None) -> dict[str, nn.Module]:
    """New modules of a layer whose keys and values become a latent. factors None: shaped as they will be, empty."""
    how, (key, _) = p.latent, weights.own
    if how is None:
        raise ValueError(f"layer {p.index} has no latent")
    heads, dim, hidden = key.weight.shape
    old = plain(layout.attention, layout.out)

    def tensor(name: str, *shape: int) -> Tensor:
        if factors is None:
            return key.weight.new_empty(shape)
        value: Tensor = getattr(factors, name)
        return value.to(key.weight).contiguous()

    bias = tensor("bias", how.width) if _biased(weights) else None
    down = linear_like(old, tensor("down", how.width, hidden), bias)
    latent = Module(down, tensor("absorb", heads, how.width, dim), tensor("up", heads, dim, how.rank), how.frequencies)
    latent.requires_grad_(old.weight.requires_grad)
    return {
        **layout.write(Weights(weights.query, None, None, weights.out)),
        layout.out: _biased_like(old, _constant(weights, factors, old.bias)) if how.centred else old,
        "latent": latent.train(old.training),
    }


def _biased_like(old: nn.Linear, bias: Tensor) -> nn.Linear:
    """The same weight with another bias."""
    new = nn.Linear(old.in_features, old.out_features, device="meta", dtype=old.weight.dtype)
    new.weight, new.bias = old.weight, nn.Parameter(bias, old.weight.requires_grad)
    return new.train(old.training)


def _constant(weights: Weights, factors: Factors | None, bias: Tensor | None) -> Tensor:
    """Bias of the output: its own, and what is constant in the values of every head."""
    if factors is None or factors.constant is None:
        return weights.out.new_empty(weights.out.shape[0])
    group = weights.out.shape[1] // factors.constant.shape[0]
    values = factors.constant.repeat_interleave(group, 0).to(weights.out.device)
    total = torch.einsum("ohd,hd->o", precise(weights.out), values)
    return (total if bias is None else total + precise(bias)).to(weights.out)


def _biased(weights: Weights) -> bool:
    return any(part is not None and part.bias is not None for part in (weights.key, weights.value))
