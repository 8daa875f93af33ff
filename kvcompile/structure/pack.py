"""The linear layers of a model in few bits: those of its decoder layers, and its head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from kvcompile.errors import KvcompileError
from kvcompile.kernels.names import WEIGHTS
from kvcompile.kernels.reference.packed import BLOCK, PackedLinear, hollow, pack, require_packable
from kvcompile.plan.plan import Plan
from kvcompile.runtime.live import decoder_layers

HEAD = "int8"  # at least: a word is chosen by the last digits of its logits
Put = tuple[nn.Module, str, nn.Linear, str]  # a module, the name of its child, that, and its format


@torch.no_grad()
def pack_weights(model: Any, format: str, plan: Plan | None = None) -> None:
    """Round the weights of all plain linear layers inside the decoder layers of `model` to `format`, in place.

    The head becomes int8, whatever the format; where it is tied to the embeddings, these stay as they are.
    Layers with fewer than 16 outputs (gates) stay as they are.
    Raises KvcompileError for weights that are no plain floats, for rows that are no multiple of 32, and for latents.
    """
    if plan is not None and any(p.latent is not None for p in plan.layers):
        raise KvcompileError(
            "projections of latents are multiplied with one another, and stay floats",
            f"model.weights={format}",
            "drop it, or the policy that makes latents",
        )
    require_cpu(model)
    for module in _linears(model, format):
        weight = module[2].weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise KvcompileError(
                f"model.weights={format} rounds plain weights",
                f"{module[1]}: {type(weight).__name__} of {weight.dtype}",
                "load the model unquantised",
            )
    embeddings = model.get_input_embeddings().weight

    def rounded(linear: nn.Linear, kind: str) -> PackedLinear:
        packed = PackedLinear(pack(linear.weight, kind), None if linear.bias is None else linear.bias.detach())
        packed.twice = linear.weight is embeddings
        return packed

    _replace(model, format, rounded)


def require_cpu(model: Any) -> None:
    """Raise KvcompileError where no kernel would read weights in few bits."""
    if model.device.type != "cpu":
        raise KvcompileError("weights in few bits are read by kernels of a CPU", f"a model on {model.device}")


def hollow_weights(model: Any, format: str) -> None:
    """As `pack_weights`, of a model without weights (on the meta device): codes to come."""

    def empty(linear: nn.Linear, kind: str) -> PackedLinear:
        weight, bias = linear.weight, linear.bias is not None
        return hollow((linear.out_features, linear.in_features), kind, bias, weight.dtype, weight.device)

    _replace(model, format, empty)


def packed_as(model: nn.Module) -> str | None:
    """The format of the decoder layers of a model; None where its weights are floats."""
    formats = [module.format for module in model.modules() if type(module) is PackedLinear]
    return min(formats, key=WEIGHTS.__getitem__, default=None)


def packed_names(model: nn.Module) -> Iterator[str]:
    """Names of what a state dict holds in place of floats."""
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) is PackedLinear:
            yield from (f"{path}.{name}" for name in ("codes", "scales", "lows"))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, those that are tied counted once."""
    tensors = {id(x): x for x in (*model.parameters(), *model.state_dict(keep_vars=True).values())}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def weight_count(model: nn.Module) -> int:
    """How many numbers the weights stand for; those that are tied, or were, counted once."""
    packed = {id(m): m.out_features * m.in_features for m in model.modules() if type(m) is PackedLinear and not m.twice}
    return sum(x.numel() for x in model.parameters()) + sum(packed.values())


def _replace(model: Any, format: str, make: Callable[[nn.Linear, str], PackedLinear]) -> None:
    places, modules = list(_linears(model, format)), dict[int, PackedLinear]()
    if not places:
        raise KvcompileError(f"model.weights={format} rounds plain linear layers", f"a {type(model).__name__} has none")
    for _, name, linear, _ in places:
        require_packable(name, (linear.out_features, linear.in_features))
    for parent, name, linear, kind in places:
        if id(linear) not in modules:
            modules[id(linear)] = make(linear, kind)
        setattr(parent, name, modules[id(linear)])
    model.config.tie_word_embeddings = False


def _linears(model: Any, format: str) -> Iterator[Put]:
    """Where linear layers stand that are rounded, and to what."""
    _, layers = decoder_layers(model)
    for parent in layers.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.out_features >= BLOCK:
                yield parent, name, child, format
    head = model.get_output_embeddings()
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is head and type(child) is nn.Linear:
                yield parent, name, child, HEAD
