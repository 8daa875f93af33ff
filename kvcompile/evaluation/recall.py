"""Cluster recall: how many of the tokens that a query would score highest are among those that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.graph import ops


def cluster_recall(queries: Tensor, keys: Tensor, read: Tensor) -> float:
    """|read and true top-B by q . k| / B, with B the entries read; the mean over the queries.

    Args:
        queries: `[g, D]`, those that read this row.
        keys: `[n, D]`, of the entries that there was a choice among.
        read: `[B]`, which of them are read.

    Source: Liu et al., ClusterKV, arXiv 2412.03213, section 5.2.
    """
    best = (queries.float() @ keys.float().mT).topk(read.numel(), dim=-1).indices
    chosen = torch.zeros(keys.shape[0], dtype=torch.bool, device=keys.device)
    chosen[read] = True
    return float(chosen[best].float().mean())


@contextmanager
def metered(model: Any) -> Iterator[dict[int, list[float]]]:
    """Measure the cluster recall of every choice that a compiled model makes: a list for each layer, filled meanwhile.

    A number for each KV head of each sequence, at each step that does not read all of its groups.
    """
    compiled = model.kvcompile
    graph, steps = compiled.graph, compiled.steps
    meter = _Meter(graph)
    compiled.graph, compiled.steps = meter.run, None  # every token through the graph that is metered
    try:
        yield meter.recalls
    finally:
        compiled.graph, compiled.steps = graph, steps


@torch.inference_mode()
def decoded_recall(model: Any, cache: Any, ids: Tensor) -> dict[int, float]:
    """Mean cluster recall of each layer that recalls, over steps that decode `ids [B, n]` one by one into the cache.

    Raises KvcompileError where no step has a choice to make.
    """
    with metered(model) as recalls:
        for token in torch.split(ids, 1, dim=1):
            model(token, past_key_values=cache, use_cache=True)
    if not recalls:
        raise KvcompileError(
            "cluster recall needs steps that read some of the groups", "none did", "a longer prompt or a smaller budget"
        )
    return {layer: sum(numbers) / len(numbers) for layer, numbers in sorted(recalls.items())}


class _Meter(fx.Interpreter):
    """Runs a graph and keeps the cluster recall of each choice, by layer."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.recalls: dict[int, list[float]] = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The node's result."""
        chosen = super().call_function(target, args, kwargs)
        if target is ops.recall and chosen is not None:
            queries, kv, _, layer = args
            if numbers := list(_of_rows(queries, kv, chosen)):
                self.recalls.setdefault(layer, []).extend(numbers)
        return chosen


def _of_rows(queries: Tensor, kv: Any, chosen: Iterable[Tensor]) -> Iterator[float]:
    """Cluster recall of each row of a layer that reads some of its groups, by the newest query."""
    by_row = torch.unflatten(queries[:, :, -1], 1, (kv.held.heads, -1)).flatten(0, 1)
    first, rows = kv.index.first, kv.held.rows()
    for query, (keys, _, _), entries, covered in zip(by_row, rows, chosen, kv.index.covered, strict=True):
        read = entries[(entries >= first) & (entries < first + covered)] - first
        if 0 < read.numel() < covered:
            yield cluster_recall(query, keys[first : first + covered].to(query.device), read)
