"""Which weights are trained, and that nobody else's are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.runtime.live import base_model
from kvcompile.structure.blocks import NAMES


def projections(model: Any, scope: str, lora: bool) -> list[str]:
    """Names of matrices of the attentions, or of all but the output embedding (`scope="all"`); `lora`: Linear ones."""
    from kvcompile.adapters.architectures import architecture_of
    from kvcompile.adapters.latent import PerHead

    kinds = nn.Linear if lora else (nn.Linear, PerHead)
    inside = {id(m) for attention in architecture_of(model.config).attentions(model) for m in attention.modules()}
    head = model.get_output_embeddings()
    new = added(model)
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds) and m is not head and n not in new]
    return [name for name, module in linear if scope == "all" or id(module) in inside]


def added(model: Any) -> list[str]:
    """Names of the modules and parameters that make a block transformer of a model; they are always trained whole."""
    prefix = base_model(model)[0]
    return [f"{prefix}.{name}" for name in NAMES if hasattr(getattr(model, prefix), name)]


def parameters(model: nn.Module, names: Sequence[str] | None) -> list[nn.Parameter]:
    """The parameters of these modules, or of these names, or all for None."""
    if names is None:
        return list(model.parameters())
    single = dict(model.named_parameters(remove_duplicate=False))
    return [p for n in names for p in ([single[n]] if n in single else model.get_submodule(n).parameters())]


def own(model: nn.Module, names: Sequence[str] | None) -> None:
    """Give `model` copies of these parameters, in place: others may share them. What is tied stays tied."""
    copies = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in parameters(model, names)}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in copies:
                module._parameters[name] = copies[id(parameter)]


def train_only(model: nn.Module, names: Sequence[str] | None) -> None:
    """Freeze everything but these."""
    wanted = {id(p) for p in parameters(model, names)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """What was frozen inside is as it was, outside, copies made meanwhile too; no gradient stays."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None


@torch.no_grad()
def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what is in `state` into the parameters of these names."""
    for name, parameter in model.named_parameters():
        if name in state:
            parameter.copy_(state[name])
