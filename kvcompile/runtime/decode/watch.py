"""What compiled code keeps addresses of, looked at before it runs."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class Watch:
    """Modules, by their names in a graph, that are to stay as they are: in their places, unhooked, weights and all."""

    def __init__(self, graph: nn.Module, names: Iterable[str]) -> None:
        modules = {name: graph.get_submodule(name) for name in names}
        above = {name: name.rpartition(".") for name in modules}
        self.links = [
            (graph.get_submodule(above[name][0])._modules, above[name][2], module) for name, module in modules.items()
        ]
        self.own = [(module.__dict__, module.__dict__.get("forward")) for module in modules.values()]
        self.weights = [
            (module._parameters, name, x, None if x is None else x.data_ptr())
            for module in modules.values()
            for name, x in module._parameters.items()
        ]
        # what moves or casts a module puts another tensor in the place of a buffer, but other memory into a parameter
        self.buffers = [
            (module._buffers, name, x) for module in modules.values() for name, x in module._buffers.items()
        ]

    def unchanged(self) -> bool:
        """Whether all of them are; spelt out, as it runs at every token."""
        for children, name, module in self.links:
            if children.get(name) is not module:
                return False
        for own, forward in self.own:
            # `hooked`, without its call: this runs for every module in every step
            if own.get("forward") is not forward or own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return False
            if own["_backward_hooks"] or own["_backward_pre_hooks"]:
                return False
        for parameters, name, x, place in self.weights:
            if parameters.get(name) is not x or (x is not None and x.data_ptr() != place):
                return False
        return all(buffers.get(name) is buffer for buffers, name, buffer in self.buffers)
