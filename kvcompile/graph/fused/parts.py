"""Modules a kernel can stand for: what each computes, told from its own forward, never from the name of its class."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from kvcompile.graph.tracer import TRACING, KVTracer
from kvcompile.kernels.cpp.lower import lowered
from kvcompile.kernels.layers import Linear, Norm
from kvcompile.kernels.reference.packed import BLOCK, Packed, PackedLinear
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
    """The weights of a plain `nn.Linear`, or those in few bits of a `PackedLinear`, as they lie. Raises Unfit."""
    require_own(module)
    bias = _or_none(module._parameters.get("bias"), dtype)
    if type(module) is PackedLinear:
        packed = module.packed
        if packed.dtype is not dtype or not packed.codes.is_cpu:
            raise Unfit(f"weights in few bits that are not on the CPU, for {dtype}")
        return Linear(packed, bias)
    if type(module) is not nn.Linear:
        raise Unfit(f"{type(module).__name__} in place of a plain nn.Linear")
    return Linear(_plain(module._parameters.get("weight"), dtype), bias)


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
    return curve_of(module, type(module).__name__)


def curve_of(function: Callable[[Tensor], Tensor], called: str) -> str:
    """The name of the activation whose curve a function has. Raises Unfit."""
    x = torch.linspace(-8, 8, 513, dtype=torch.float32, device="cpu")
    x = torch.cat((x, 8 * x))
    with torch.no_grad():
        y = function(x)
    for name, curve in CURVES.items():
        if y.shape == x.shape and torch.allclose(y, curve(x), rtol=1e-5, atol=1e-5):
            return name
    raise Unfit(f"{called} is none of {', '.join(CURVES)}")


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
    idle = without_dropout(graph, module)
    nodes: list[Any] = [node for node in graph.nodes if node.op != "placeholder" or node.users]
    inputs, down = [node for node in nodes if node.op == "placeholder"], nodes[-1].args[0]
    if len(inputs) != 1 or not _called(down):
        raise unfit
    inner = down.args[0]
    product = inner.args if inner.target in (operator.mul, torch.mul) else (inner,)
    curved = [node for node in product if _curves(node) and _projection(node.args[0]) is not None]
    straight = [node for node in product if node not in curved]
    projections = [_projection(node) for node in (*(node.args[0] for node in curved), *straight)]
    if len(curved) != 1 or any(each is None or each.call.args[0] is not inputs[0] for each in projections):
        raise unfit
    own = [each for each in projections if each is not None]
    if {*nodes} != {*inputs, *(node for each in own for node in each.nodes), *product, inner, down, nodes[-1]}:
        raise unfit
    weights = [each.rows(linear(module.get_submodule(str(each.call.target)), dtype)) for each in own]
    curve, named = curved[0], [*(each.call for each in own), down]
    if curve.op == "call_module":
        act = activation(module.get_submodule(str(curve.target)))
        named.append(curve)
    else:
        act = curve_of(lambda x: curve.target(x, *curve.args[1:], **curve.kwargs), curve.target.__name__)
    names = dict.fromkeys(str(node.target) for node in named)
    last = linear(module.get_submodule(str(down.target)), dtype)
    return Mlp(weights[-1], last, act, weights[0] if straight else None, (*names, *idle))


@dataclass(frozen=True)
class _Projection:
    """A linear layer that is called, or one of the equal pieces that its output is cut into; nodes: all between."""

    call: fx.Node
    nodes: tuple[fx.Node, ...]
    piece: int = 0
    pieces: int = 1

    def rows(self, whole: Linear) -> Linear:
        """The weights of the piece. Raises Unfit where pieces differ."""
        if whole.weight.shape[0] % self.pieces or not 0 <= self.piece < self.pieces:
            raise Unfit("a projection that is cut into unequal pieces")
        size = whole.weight.shape[0] // self.pieces
        return rows_of(whole, self.piece * size, size)


def _projection(node: Any) -> _Projection | None:
    """What a node is the output of, if that is a linear layer or a piece of one; None for anything else."""
    if _called(node):
        return _Projection(node, (node,))
    if getattr(node, "target", None) is not operator.getitem or not isinstance(node.args[1], int):
        return None
    cut, piece = node.args
    dim = cut.kwargs.get("dim", cut.args[2] if len(cut.args) > 2 else 0)
    if cut.target not in ("chunk", torch.chunk) or dim != -1 or not _called(cut.args[0]):
        return None
    return _Projection(cut.args[0], (cut.args[0], cut, node), piece, cut.args[1])


def rows_of(whole: Linear, start: int, count: int) -> Linear:
    """So many rows of a linear layer, from one on, where they lie. Raises Unfit."""
    weight, stop = whole.weight, start + count
    bias = None if whole.bias is None else whole.bias[start:stop]
    if not isinstance(weight, Packed):
        return Linear(weight[start:stop], bias)
    if count == weight.shape[0]:
        return whole
    if start % BLOCK or count % BLOCK:
        raise Unfit("a piece of weights in few bits that is no whole number of blocks")
    first, last = start // BLOCK, stop // BLOCK
    lows = None if weight.lows is None else weight.lows[first:last]
    shape = count, weight.shape[1]
    return Linear(
        replace(weight, shape=shape, codes=weight.codes[first:last], scales=weight.scales[first:last], lows=lows), bias
    )


def without_dropout(graph: fx.Graph, modules: nn.Module) -> list[str]:
    """Take what drops nothing out of a graph (dropouts of a model that is not trained); names of their modules."""
    names = []
    for node in list(graph.nodes):
        idle = node.target is F.dropout and not node.kwargs.get("training", True)
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            module = modules.get_submodule(str(node.target))
            idle = type(module) is nn.Identity or (type(module) is nn.Dropout and not module.training)
            idle = idle and not hooked(vars(module))
            names += [str(node.target)] if idle else []
        if idle:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return names


def _curves(node: Any) -> bool:
    """Whether it is a node that could be an activation: a module, or a function of one tensor."""
    if _called(node):
        return True
    function = isinstance(node, fx.Node) and node.op == "call_function" and node.all_input_nodes == [*node.args[:1]]
    return function and node.target is not operator.getitem


def _called(node: Any) -> bool:
    """Whether it is a node, the call of a module with one argument and nothing beside it."""
    return isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs
