"""A graph over a model's own module tree: whatever stands in the tree when a node is called is what runs.

And other ways into and out of it: from embeddings, and with the hidden states between layers.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch.fx as fx
from torch import nn

from kvcompile.errors import KvcompileError


class LiveGraph(fx.GraphModule):
    """A graph that finds its modules by name in `root.model` at every call.

    torch.fx would keep references of its own to the modules that it calls: an adapter, a new head or a quantised layer
    put into the model later would not run.
    """

    model: nn.Module

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "GraphModule") -> None:
        super().__init__(root, graph, class_name)
        self.model = root.model  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveGraph:
        """The graph over the copy of the model."""
        clone = self.twin()
        memo[id(self)] = clone
        clone.model = copy.deepcopy(self.model, memo)
        return clone

    def twin(self) -> LiveGraph:
        """A second graph over the same modules, to be rewritten."""
        return LiveGraph(self, copy.deepcopy(self.graph), type(self).__name__)


def from_embeddings(graph: LiveGraph) -> LiveGraph:
    """The graph that takes embeddings `[B, Q, hidden]` in place of token ids.

    Raises KvcompileError where token ids are read otherwise too: by layers that have embeddings of their own.
    """
    rewritten = graph.twin()
    ids = next(node for node in rewritten.graph.nodes if node.op == "placeholder")
    readers = [node for node in _readers(ids) if node.op == "call_module"]
    if len(readers) != 1 or readers[0] not in ids.users:
        rule = "inputs_embeds stand for token ids where nothing but the embedding reads these, as they are"
        raise KvcompileError(rule, ", ".join(str(node.target) for node in readers), "pass input_ids")
    (embedded,) = readers
    embedded.replace_all_uses_with(ids)
    rewritten.graph.erase_node(embedded)
    rewritten.recompile()
    return rewritten


def with_states(graph: LiveGraph) -> LiveGraph:
    """The graph that returns `(logits, states)`: what enters each decoder layer, and the normed output of the last.

    Raises KvcompileError where several states of each token go from layer to layer.
    """
    rewritten = graph.twin()
    model: Any = rewritten.model
    name, inner = base_model(model)
    base = f"model.{name}"
    modules = [node for node in rewritten.graph.nodes if node.op == "call_module"]
    calls = [node for node in modules if str(node.target).startswith(f"{base}.")]
    path, decoders = decoder_layers(inner)
    layers = [f"{base}.{path}.{i}." for i in range(len(decoders))]
    states: list[Any] = [_first_call(calls, layer).args[0] for layer in layers]
    if any(node.target is operator.getitem for node in states):
        raise KvcompileError("one state of each token goes from layer to layer", "a stack of several (gemma3n)")
    (end,) = (node for node in rewritten.graph.nodes if node.op == "output")
    end.args = ((end.args[0], (*states, calls[-1])),)  # the norm is the last module that the base model calls
    rewritten.recompile()
    return rewritten


def _readers(ids: fx.Node) -> list[fx.Node]:
    """What token ids reach through plain functions, the first modules among it; a step and sizes are no token ids."""
    reached: dict[fx.Node, None] = {}
    ahead = [ids]
    while ahead:
        for user in ahead.pop().users:
            name = getattr(user.target, "__name__", user.target)
            if user not in reached and name not in ("begin", "getattr", "size"):
                reached[user] = None
                ahead += [user] if user.op != "call_module" else []
    return list(reached)


def base_model(model: Any) -> tuple[str, Any]:
    """Name and module of what is below the head: by transformers' prefix, or `model` where nothing has that name."""
    name = model.base_model_prefix
    return (name, getattr(model, name)) if hasattr(model, name) else ("model", model.model)


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the list as long as the config says. Raises KvcompileError without one."""
    config = model.config.get_text_config()
    count = getattr(config, "num_layers", config.num_hidden_layers)  # attentions are more than these in longcat_flash
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise KvcompileError(
        "the model must have one list of decoder layers", f"none of length {count} in {type(model).__name__}"
    )


def _first_call(calls: list[fx.Node], inside: str) -> fx.Node:
    """The first call of a module below a name."""
    return next(node for node in calls if str(node.target).startswith(inside))


class Skeleton:
    """The modules that a trace went through: base model, decoder layers, attentions.

    What their own `forward` does is in the graph and does not run, so that a hook on one would not fire, and another
    one in its place would not be seen. `check` refuses both.
    """

    def __init__(self, model: nn.Module, leaf: Callable[[nn.Module, str], bool]) -> None:
        self.links = list(_links(model, leaf))
        self.sizes = [(m, len(m)) for _, _, _, m in self.links if isinstance(m, nn.ModuleList)]

    def check(self) -> None:
        """Raises KvcompileError naming the first module that is not as it was traced."""
        for name, parent, child, module in self.links:
            if parent._modules.get(child) is not module:
                raise _changed(name)
            require_unhooked(name, module)
        for module, size in self.sizes:
            if len(module) != size:
                raise _changed("the list of layers")


def require_unhooked(name: str, module: nn.Module) -> None:
    """Raise KvcompileError where a module that a graph stands for has hooks or a forward put in by hand."""
    own = module.__dict__
    if hooked(own) or "forward" in own:
        raise KvcompileError(
            f"{name} runs as nodes of a graph: its own forward is never called, so a hook on it would not fire",
            "a hook or a forward of another",
            "remove it; hook the projections, norms and MLP inside, or ask for output_hidden_states=True",
        )


def hooked(own: dict[str, Any]) -> bool:
    """Whether the attributes of a module have a hook among them; spelt out, as it runs at every token."""
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def _changed(name: str) -> KvcompileError:
    return KvcompileError(
        f"{name} is part of the compiled graph and stays as it was compiled",
        "another module in its place",
        "change the model first, then compile it; projections, norms, MLPs, embeddings and head may be replaced",
    )


def _links(
    module: nn.Module, leaf: Callable[[nn.Module, str], bool], above: str = ""
) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    for name, child in module.named_children():
        if not leaf(child, name):
            path = f"{above}{name}"
            yield path, module, name, child
            yield from _links(child, leaf, f"{path}.")
