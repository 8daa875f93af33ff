"""Running a compiled graph over a program's cache: the nodes that touch the cache call other functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from kvcompile.errors import KvcompileError
from kvcompile.exporters.static.cache import DecodeCache, PrefillCache, State, empty
from kvcompile.exporters.static.capacity import Limits, Room, rooms
from kvcompile.graph import ops
from kvcompile.plan.plan import Plan
from kvcompile.runtime.attention import Expansion
from kvcompile.runtime.cache import Rotary
from kvcompile.runtime.live import LiveGraph

Cache = PrefillCache | DecodeCache


def _together(kv: Any, *queries: Tensor) -> Tensor:
    heads = kv.room.plan.kv_heads
    return torch.cat([torch.unflatten(x, 1, (heads, -1)) for x in queries], 2).flatten(1, 2)


def _attend(queries: Tensor, kv: Any, cache: Cache, layer: int, *expansion: Expansion) -> Tensor:
    return cache.attend(cache.plan.layers[layer], queries, kv, *expansion).transpose(1, 2).flatten(2)


def _frequencies(angles: Tensor, chosen: tuple[int, ...]) -> Tensor:
    """As the graph's own, whose table is kept between calls: none may be made in a trace."""
    return angles.index_select(-1, torch.tensor(chosen + chosen, device=angles.device, dtype=torch.int64))


def _observe(kv: Any, queries: Tensor, unrotated: Tensor, cache: Cache, layer: int) -> Any:
    return kv, cache.observe(kv, queries, unrotated)


def _allocate(cache: Cache, layers: Sequence[int], *scores: Any) -> None:
    cache.keep(dict(zip(layers, scores, strict=True)))


# a program's cache is its own step
LOWERED: Mapping[Any, Callable[..., Any]] = {
    ops.begin: lambda cache, ids, mask: cache,
    ops.kv_append: lambda cache, keys, values, step, layer: cache.append(layer, keys, values),
    ops.observe: _observe,
    ops.together: _together,
    ops.attend: _attend,
    ops.frequencies: _frequencies,
    ops.compress: lambda kv, scores, cache, layer: cache.keep({layer: scores}),
    ops.allocate: _allocate,
    ops.trim: lambda kv, cache, layer: cache.trim(kv),
    ops.flush: lambda kv, cache, layer: cache.flush(kv),
}


PURE = (ops.rope, ops.hadamard, ops.halves)


def _require_lowered(graph: fx.Graph) -> None:
    """Raise KvcompileError for a graph with a node that reads the cache in a way that no program has."""
    strange = {ops.NAMES[n.target] for n in graph.nodes if n.target in ops.NAMES} - {
        op.__name__ for op in (*LOWERED, *PURE)
    }
    if strange:
        fix = "drop the policy whose pass put it there, or keep to the artifact, which kvcompile runs"
        raise KvcompileError("a program expresses every node of the graph", ", ".join(sorted(strange)), fix)


def lowered(traced: LiveGraph) -> LiveGraph:
    """A twin of a compiled graph whose cache's nodes call the functions of a program. Raises KvcompileError."""
    _require_lowered(traced.graph)
    twin = traced.twin()
    for node in twin.graph.nodes:
        if node.op == "call_function":
            node.target = LOWERED.get(node.target, node.target)
    twin.recompile()
    return twin


class Program(nn.Module):
    """A compiled model for one batch size and a longest sequence; `prefill` and `decode` are functions of tensors."""

    def __init__(self, model: nn.Module, limits: Limits) -> None:
        super().__init__()
        compiled: Any = model.kvcompile
        self.traced: LiveGraph = lowered(compiled.graph)
        self.plan: Plan = compiled.plan
        self.rotaries: list[Rotary] = compiled.rotaries
        self.limits = limits
        self.rooms: list[Room] = rooms(self.plan, limits)
        for room in self.rooms:
            for name, table in room.tables.items():
                self.register_buffer(
                    f"{name}_{room.plan.index}", torch.tensor(table, device=self.device, dtype=torch.int64)
                )

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.traced.parameters()).device

    def empty(self) -> State:
        """A cache that holds nothing."""
        return empty(self.plan, self.rooms, self.limits.batch, self.device)

    def prefill(self, ids: Tensor) -> tuple[Tensor, State]:
        """Logits `[B, 1, vocabulary]` after a prompt `ids [B, T]`, and the state that decoding goes on from."""
        cache = PrefillCache(self.plan, self.rooms, self._tables, self.rotaries, ids)
        logits = self._run(ids, cache.positions.expand(ids.shape[0], -1), cache)
        return logits, cache.state

    def decode(self, ids: Tensor, state: State) -> Tensor:
        """Logits `[B, 1, vocabulary]` after one more token `ids [B, 1]`; `state` is changed in place."""
        cache = DecodeCache(self.plan, self.rooms, self._tables, state)
        return self._run(ids, cache.before.expand(ids.shape[0], 1), cache)

    @property
    def _tables(self) -> dict[str, Tensor]:
        return dict(self.named_buffers(recurse=False))

    def _run(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        logits: Tensor = self.traced(ids, None, positions, cache, slice(-1, None))
        return logits
