"""Modules a kernel can stand for: what each computes, told from its own forward, never from the name of its class."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from kvcompile.graph.tracer import TRACING, KVTracer
from kvcompile.kernels.cpp.lower import lowered
from kvcompile.kernels.layers import Linear, Norm
from kvcompile.runtime.live import hooked

SCALES = (1e-3, 1.0, 30.0)  # of the rows that a norm is tried on: where its epsilon weighs, and where it does not
EPSILONS = ("variance_epsilon", "eps")


class Unfit(Exception):
    """Why a kernel cannot stand for a module, in a few words."""


def require_own(module: nn.Module) -> None:
    """Raise Unfit where something else than the forward of a module's class would run."""
    if hooked(vars(module)) or ("forward" in vars(module) and not lowered(module)):
        raise Unfit("a hook or a forward of another")


def linear(module: nn.Module, dtype: torch.dtype) -> Linear:
    """The weights of a plain `nn.Linear`, as they lie. Raises Unfit."""
    if type(module) is not nn.Linear:
        raise Unfit(f"{type(module).__name__} in place of a plain nn.Linear")
    require_own(module)
    return Linear(_plain(module._parameters.get("weight"), dtype), _or_none(module._parameters.get("bias"), dtype))


def _or_none(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else _plain(x, dtype)


def _plain(x: Tensor | None, dtype: torch.dtype) -> Tensor:
    if x is None or type(x) is not nn.Parameter or x.layout is not torch.strided:
        raise Unfit("a weight that is no plain parameter")
    if x.dtype is not dtype or not x.is_cpu or not x.is_contiguous():
        raise Unfit(f"a weight that is not contiguous on the CPU in {dtype}")
    return x


def norm(module: nn.Module, dtype: torch.dtype) -> Norm:
    """The formula and weights of a norm over the last dimension, found by trying it on rows. Raises Unfit."""
    require_own(module)
    own = dict(module.named_parameters())
    if {*own} - {"weight", "bias"} or any(True for _ in module.children()) or any(True for _ in module.buffers()):
        raise Unfit(f"{type(module).__name__} is no plain norm")
    weight, bias = (_or_none(own.get(name), dtype) for name in ("weight", "bias"))
    eps = next((float(value) for name in EPSILONS if (value := getattr(module, name, None)) is not None), None)
    if weight is None or weight.ndim != 1 or eps is None:
        raise Unfit(f"{type(module).__name__} is no plain norm")
    shape, seeded = (len(SCALES), weight.shape[0]), torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(shape, generator=seeded, dtype=torch.float32, device="cpu")
    rows = (rows + 0.5) * torch.tensor(SCALES, dtype=torch.float32, device="cpu").unsqueeze(1)
    with torch.no_grad():
        out = copy.deepcopy(module).to(torch.float32)(rows.view(1, *rows.shape))[0].double()
    w, b = weight.detach().double(), None if bias is None else bias.detach().double()
    for kind, formula in FORMULAS.items():
        expected = formula(rows.double(), w, b, eps)
        if out.shape == expected.shape and torch.allclose(out, expected, rtol=1e-5, atol=1e-5 * float(w.abs().max())):
            return Norm(kind, weight, bias, eps)
    raise Unfit(f"{type(module).__name__} is no plain norm")


def _rms(x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> Tensor:
    z = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w
    return z if b is None else z + b


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "rms": _rms,
    "rms_plus_one": lambda x, w, b, eps: _rms(x, 1 + w, b, eps),
    "layer": lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, b, eps),
}
CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def activation(module: nn.Module) -> str:
    """The name of an activation, found by its curve. Raises Unfit."""
    require_own(module)
    if any(True for _ in (*module.parameters(), *module.buffers())):
        raise Unfit(f"{type(module).__name__} is no plain activation")
    x = torch.linspace(-8, 8, 513, dtype=torch.float32, device="cpu")
    x = torch.cat((x, 8 * x))
    with torch.no_grad():
        y = module(x)
    for name, curve in CURVES.items():
        if y.shape == x.shape and torch.allclose(y, curve(x), rtol=1e-5, atol=1e-5):
            return name
    raise Unfit(f"{type(module).__name__} is none of {', '.join(CURVES)}")


@dataclass(frozen=True)
class Mlp:
    """The parts of an MLP, down(act(gate) * up), or down(act(up)), and their names in it."""

    up: Linear
    down: Linear
    activation: str
    gate: Linear | None
    names: tuple[str, ...]


class _Parts(KVTracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def mlp(module: nn.Module, dtype: torch.dtype) -> Mlp:
    """What an MLP is made of, read off its own forward. Raises Unfit."""
    require_own(module)
    unfit = Unfit(f"{type(module).__name__} is no plain MLP")
    try:
        with TRACING:
            graph = _Parts().trace(module)
    except Exception as error:  # whatever a forward does with what is no tensor
        raise unfit from error
    nodes: list[Any] = [node for node in graph.nodes if node.op != "placeholder" or node.users]
    inputs, down = [node for node in nodes if node.op == "placeholder"], nodes[-1].args[0]
    if len(inputs) != 1 or not _called(down):
        raise unfit
    inner = down.args[0]
    product = inner.args if inner.target in (operator.mul, torch.mul) else (inner,)
    curved = [node for node in product if _called(node) and _called(node.args[0])]
    straight = [node for node in product if node not in curved]
    projections = [*(node.args[0] for node in curved), *straight]
    if len(curved) != 1 or not all(_called(node) and node.args[0] is inputs[0] for node in projections):
        raise unfit
    if len(nodes) != 5 + 2 * len(straight):  # x, up, act, down, end; gate and product
        raise unfit
    names = tuple(str(node.target) for node in (*projections, down, curved[0]))
    *weights, last = (linear(module.get_submodule(name), dtype) for name in names[:-1])
    return Mlp(weights[-1], last, activation(module.get_submodule(names[-1])), weights[0] if straight else None, names)


def _called(node: Any) -> bool:
    """Whether it is a node, the call of a module with one argument and nothing beside it."""
    return isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs
