"""Whole-model torch.fx trace of a Hugging Face causal LM whose attention has been swapped for our adapters.

transformers 5 dropped its own fx support; norms, MLPs, embeddings and rotary modules are leaves here, adapters are
transparent, so that per layer `q_proj, k_proj, v_proj, rope, kv_append, observe, attend, o_proj` are nodes.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from kvcompile.graph import ops
from kvcompile.runtime.live import LiveGraph, Skeleton, decoder_layers

TRACED = "kvcompile_traced"  # attribute of the modules that are looked through: our adapters
ATTENDING = ("full_attention", "sliding_attention")  # types of layers, as transformers' models look up their masks
STATEFUL = ("linear_attention", "conv")
TRACING = threading.Lock()  # torch.fx patches `nn.Module` for the whole process while it traces


class StepProxy(fx.Proxy):
    """Stands for the `Step` on the edge where transformers expects an attention mask.

    It passes for a ready 4-D mask, which transformers' mask builders hand through untouched.
    """

    shape = (0, 0, 0, 0)
    ndim = 4

    def to(self, *args: Any, **kwargs: Any) -> StepProxy:
        """Itself: it is of every device and dtype."""
        return self

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What `isinstance` in the mask builders asks for."""
        return torch.Tensor


class CacheProxy(fx.Proxy):
    """Stands for our cache; transformers only asks which layers slide, and ours answers by positions instead."""

    is_sliding = (False,)
    is_compileable = False


class GridProxy(fx.Proxy):
    """Stands for positions in four ways, which transformers looks at the shape of."""

    shape = (4, 0, 0)
    ndim = 3


class Entry(nn.Module):
    """The traced signature: one forward pass of a causal LM over new tokens, with our cache."""

    def __init__(self, model: nn.Module, stateful: bool = False, grid: bool = False) -> None:
        super().__init__()
        self.model, self.stateful, self.grid = model, stateful, grid

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any, logits_to_keep: Any) -> Any:
        """Logits `[B, kept, vocabulary]`."""
        step: Any = ops.begin(cache, input_ids, attention_mask)
        masks = step
        if self.stateful:  # masks are ready: for layers that attend, and for those that keep a state
            masks = {**dict.fromkeys(ATTENDING, step), **dict.fromkeys(STATEFUL, ops.padding(step))}
        return self.model(
            input_ids=input_ids,
            attention_mask=masks,
            position_ids=ops.grid(position_ids) if self.grid else position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        ).logits


class States(fx.Proxy):
    """Stands for any value; what is assigned to a part of it is written there."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __getattr__(self, name: str) -> Any:
        return Shape(self, name) if name == "shape" else super().__getattr__(name)

    def __len__(self) -> int:
        return 2 if _batch_and_tokens(self.node) else super().__len__()


class Shape(fx.proxy.Attribute):
    """Stands for the shape of a value."""

    def __len__(self) -> int:
        return 2 if _batch_and_tokens(self.node) else super().__len__()


def _batch_and_tokens(node: fx.Node) -> bool:
    """Whether it is the shape of token ids (some models put others in place of some), or all of one but channels."""
    if node.target is operator.getitem and node.args[1] == slice(None, -1):
        return _size(node.args[0])
    if node.target is not getattr or node.args[1] != "shape":
        return False
    of: Any = node.args[0]
    return of.op == "placeholder" or of.target is torch.where


def _size(value: Any) -> bool:
    """Whether it is a shape, or some numbers of it."""
    while isinstance(value, fx.Node) and value.target is operator.getitem:
        value = value.args[0]
    return isinstance(value, fx.Node) and value.target is getattr and value.args[1] == "shape"


class KVTracer(fx.Tracer):
    """Traces through the causal LM, its decoder layers, what holds an adapter, and our adapters; all else is a leaf.

    Shapes are `[B, Q]`, with channels behind, and the same in all of a pass: what a model asks of them is answered so.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__(param_shapes_constant=True)
        self.thread = threading.get_ident()
        self.transparent: set[int] = set()
        if model is not None:
            holders = (m for m in model.modules() if any(getattr(below, TRACED, False) for below in m.modules()))
            self.transparent = {id(model), *map(id, holders), *(id(layer) for layer in decoder_layers(model)[1])}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Everything but the skeleton and our adapters."""
        return (
            id(m) not in self.transparent
            and not isinstance(m, (nn.ModuleList, Entry))
            and not getattr(m, TRACED, False)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Models that run in other threads meanwhile are none of this trace's business."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, ""):  # one that is not looked through writes into transformers' own cache
            args = tuple(_own_cache(x) for x in args)
            kwargs = {name: _own_cache(x) for name, x in kwargs.items()}
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """As `call_module`: other threads get the attribute itself."""
        if threading.get_ident() != self.thread:
            return attr_val
        if isinstance(attr_val, torch.Tensor) and not isinstance(attr_val, nn.Parameter):
            return self._buffer(attr_val, parameter_proxy_cache)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _buffer(self, buffer: torch.Tensor, proxies: dict[str, fx.Proxy]) -> Any:
        """What stands for a buffer of the model; a tensor that is none stands for itself."""
        name = next((name for name, x in self.root.named_buffers() if x is buffer), None)
        if name is None:
            return buffer
        if name not in proxies:
            proxies[name] = self.create_proxy("get_attr", name, (), {})
        return proxies[name]

    def create_arg(self, a: Any) -> Any:
        """A step proxy passes for a tensor; as an argument it is its node."""
        return a.node if type(a) is StepProxy else super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Proxies that answer what transformers asks of a mask and of a cache."""
        if node.target is ops.begin:
            return StepProxy(node, self)
        if node.op == "placeholder" and node.target == "cache":
            return CacheProxy(node, self)
        if node.target is ops.grid:
            return GridProxy(node, self)
        return States(node, self)

    def iter(self, obj: Any) -> Iterator[Any]:
        """Batch and tokens, of a shape without its channels."""
        return iter((obj[0], obj[1])) if _batch_and_tokens(obj.node) else super().iter(obj)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Whether two shapes are alike: they are; whether there are so many tokens: nobody knows, so not."""
        node = obj.node
        if node.target not in (operator.eq, operator.ne) or not any(map(_size, node.args)):
            return super().to_bool(obj)
        return all(map(_size, node.args)) == (node.target is operator.eq)


def _own_cache(argument: Any) -> Any:
    cache: Any = argument
    return ops.states(cache) if isinstance(argument, CacheProxy) else argument


def skeleton(model: nn.Module) -> Skeleton:
    """What of a model, whose attention has been swapped, a trace goes through."""
    return Skeleton(model, KVTracer(model).is_leaf_module)


def trace(model: nn.Module, stateful: bool = False, grid: bool = False) -> LiveGraph:
    """The graph of one forward pass (arguments of `Entry.forward`); its leaves are those of `model` at every call.

    stateful: some layers keep a state. grid: the model wants positions in four ways.
    """
    entry = Entry(model, stateful, grid)
    tracer = KVTracer(model)
    with TRACING:
        graph = tracer.trace(entry)
    module = LiveGraph(entry, graph, class_name=type(model).__name__)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
