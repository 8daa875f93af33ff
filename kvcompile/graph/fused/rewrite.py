"""The graph of a decode step: the compiled graph with generated kernels around the attention of its layers."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.fx as fx
from torch import Tensor, nn

from kvcompile.graph import ops
from kvcompile.graph.fused.match import Angle, Matcher
from kvcompile.graph.fused.parts import Unfit, without_dropout
from kvcompile.graph.wiring import attends
from kvcompile.kernels.layers import LayerKernels
from kvcompile.runtime.decode.steps import FusedSteps, Steps
from kvcompile.runtime.decode.watch import Watch
from kvcompile.runtime.live import LiveGraph


class Kernel(nn.Module):
    """A kernel as a module of a graph: it has no weights of its own."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def __call__(self, *args: Tensor | None) -> Any:
        """What the kernel gives, without a module's own way to its forward: nothing can be hooked to it."""
        return self.run(*args)


def fused_steps(kernels: LayerKernels) -> FusedSteps:
    """How a model with these kernels decodes a token."""
    return FusedSteps(partial(fuse, kernels=kernels))


def fuse(whole: LiveGraph, kernels: LayerKernels) -> Steps:
    """The graph of a decode step, made of the whole one, which stays as it is; and where it has no kernels, and why."""
    model: Any = whole.model
    dtype = model.get_input_embeddings().weight.dtype
    refused: dict[str, list[int]] = {}
    reason = kernels.refuses(str(dtype).removeprefix("torch."))
    if reason is not None:
        return Steps(None, Watch(whole, ()), 0, {reason: sorted(attends(whole.graph))})
    graph, root, modules = copy.deepcopy(whole.graph), nn.Module(), set[str]()
    root.model, root.before, root.after = whole.model, nn.ModuleList(), nn.ModuleList()
    modules |= set(without_dropout(graph, whole))
    for layer, attend in attends(graph).items():
        for put in (_before, _after):
            matcher = Matcher(whole, dtype)
            try:
                put(graph, root, matcher, attend, kernels)
            except Unfit as error:
                refused.setdefault(str(error), []).append(layer)
            else:
                modules |= matcher.modules
    places = len(root.before) + len(root.after)
    if not places:
        return Steps(None, Watch(whole, ()), 0, refused)
    fused = LiveGraph(root, graph, type(whole).__name__)
    fused.graph.eliminate_dead_code()
    fused.graph.lint()
    for node in fused.graph.nodes:  # a trace takes the whole graph, so that no node of this one need be hidden from it
        node.target = ops.DIRECT.get(node.target, node.target)
    fused.recompile()
    return Steps(fused, Watch(whole, sorted(modules)), places, refused)


def _before(graph: fx.Graph, root: Any, matcher: Matcher, attend: fx.Node, kernels: LayerKernels) -> None:
    place = matcher.before(attend)
    plain = tuple(head.turned is not None and bool(head.others) for head in place.heads)
    angles = [_wide(graph, angle) for angle in place.angles or ()]
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = max((place.norm, *angles), key=order.__getitem__)
    if any(order[user] <= order[last] for head in place.heads for user in head.others):
        raise Unfit("something reads its queries before their angles are known")
    with graph.inserting_after(last):
        made = graph.call_module(f"before.{len(root.before)}", (place.states, *(angles or (None, None))))
    root.before.append(Kernel(kernels.before(place.layer, plain)))
    count = len(place.heads)
    for i, (head, wanted) in enumerate(zip(place.heads, plain, strict=True)):
        with graph.inserting_after(made):
            item = graph.call_function(operator.getitem, (made, i))
            before = graph.call_function(operator.getitem, (made, count + i)) if wanted else None
        if head.turned is not None:
            head.turned.replace_all_uses_with(item)
        for user in head.others:
            user.replace_input_with(head.plain, item if before is None else before)


def _after(graph: fx.Graph, root: Any, matcher: Matcher, attend: fx.Node, kernels: LayerKernels) -> None:
    place = matcher.after(attend)
    with graph.inserting_before(place.end):
        made = graph.call_module(f"after.{len(root.after)}", (place.attended, place.states))
    root.after.append(Kernel(kernels.after(place.layer)))
    place.end.replace_all_uses_with(made)


def _wide(graph: fx.Graph, angle: Angle) -> fx.Node:
    """Angles in float32, made once for all layers that turn by them."""
    source, item = angle
    for user in source.users:
        if user.target is ops.wide and item is None:
            return user
        if user.target is operator.getitem and user.args[1] == item:
            for wide in user.users:
                if wide.target is ops.wide:
                    return wide
    with graph.inserting_after(source):
        one = source if item is None else graph.call_function(operator.getitem, (source, item))
    with graph.inserting_after(one):
        return graph.call_function(ops.wide, (one,))
