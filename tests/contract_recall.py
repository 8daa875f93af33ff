"""The contract table of recall: a row for each policy that keeps all and reads few, and what it stands beside."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from contract_table import KIVI8, SNAPKV, STRUCTURES, Options, dense, plan_of
from torch import Tensor

from kvcompile.compiler import compile_plan
from kvcompile.graph import ops
from kvcompile.kernels.dispatch import named
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import Plan
from kvcompile.plan.recall import Recall
from kvcompile.runtime.cache import KVCache
from kvcompile.runtime.layer import LayerCache

BUDGET, SINKS, RECENT, EVERY = 16, 3, 6, 8


@dataclass(frozen=True)
class Row:
    """What the contract must know of a policy that recalls.

    policy: its name. fields: those that suit prompts of 60 tokens, beside the budget, sinks, recent and every above.
    refused: what of `BESIDE` it cannot stand beside.
    """

    policy: str
    fields: dict[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()

    def stack(self, beside: str = "alone", **more: Any) -> Options:
        """The policy among those of `BESIDE`; `more` are fields of its own."""
        before, after = BESIDE[beside]
        own = {"budget": BUDGET, "sinks": SINKS, "recent": RECENT, "every": EVERY, "skip_layers": []}
        return {**before, self.policy: {**own, **self.fields, **more}, **after}

    def plan(self, beside: str = "alone", architecture: str = "llama", chunk: int = 0, **more: Any) -> Plan:
        """The checked plan of `stack` on a tiny model."""
        return plan_of(self.stack(beside, **more), architecture, prefill_chunk=chunk)


@functools.lru_cache(64)
def model_of(
    name: str, beside: str = "alone", architecture: str = "llama", kernels: str = "sdpa", chunk: int = 0, **more: Any
) -> Any:
    """The tiny model compiled with a row of the table, built once."""
    plan = TABLE[name].plan(beside, architecture, chunk, **more)
    return compile_plan(shared(dense(architecture)), plan, kernels)


TABLE: dict[str, Row] = {
    "quest": Row("quest", {"page": 4}),
    "quest, max": Row("quest", {"page": 3, "agree": "max"}),
    "quest, reuse": Row("quest", {"page": 4, "reuse": 3}),
    "infllm": Row("infllm", {"block": 4, "strongest": 2, "far": "original"}, refused=("adakv",)),
    "clusterkv": Row("clusterkv", {"tokens_per_cluster": 6}, refused=("snapkv, rotate, kivi",)),
}

PROMPT_ONLY = {"budget": 40, "decode_every": 0}  # a selection that a recall may follow

# policies before and after a recall
BESIDE: dict[str, tuple[Options, Options]] = {
    "alone": ({}, {}),
    "gqa": (STRUCTURES["gqa"], {}),
    "cla": (STRUCTURES["cla"], {}),
    "mla": (STRUCTURES["mla"], {}),
    "snapkv": ({"snapkv": {**SNAPKV, **PROMPT_ONLY}}, {}),
    "adakv": ({"adakv": PROMPT_ONLY}, {}),
    "kivi": ({}, KIVI8),
    "int8": ({}, {"int8": {"residual": 5}}),
    "paged": ({}, {"paged": {"page": 4}}),
    "offload": ({}, {"offload": {"keep": 1}}),
    "kivi, paged, offload": ({}, {**KIVI8, "paged": {"page": 4}, "offload": {}}),
    "snapkv, rotate, kivi": ({"snapkv": {**SNAPKV, **PROMPT_ONLY}}, {"rotate": {}, **KIVI8}),
}
DROPS = {"snapkv", "adakv", "snapkv, rotate, kivi"}
ENCODES = {"kivi", "int8", "kivi, paged, offload", "snapkv, rotate, kivi"}
FIRST = {row.policy: name for name, row in reversed(TABLE.items())}  # a row of each meets everything


def pairs(*besides: str) -> list[tuple[str, str]]:
    """(row, what it stands beside): `besides` (default: everything) for a row of each policy, nothing for others."""
    wanted = besides or tuple(BESIDE)
    everything = [(name, b) for name in FIRST.values() for b in wanted if b not in TABLE[name].refused]
    return [*everything, *((name, "alone") for name in TABLE if name not in FIRST.values())]


def recalls(cache: KVCache) -> list[LayerCache]:
    """The layers whose steps choose what they read."""
    return [layer for layer in cache.layers if layer.plan.recall is not None]


def parts_of(layer: LayerCache, row: int) -> tuple[list[int], list[list[int]], list[int]]:
    """The entries of a row: sinks, each group, recent ones."""
    length, index = layer.held.lengths[row], layer.index
    if index is None or index.table is None:
        return list(range(length)), [], []
    count, table = index.counts[row], index.table
    spans = zip(table.starts[row, :count].tolist(), table.sizes[row, :count].tolist(), strict=True)
    groups = [list(range(start, start + size)) for start, size in spans]
    return list(range(min(index.first, length))), groups, list(range(index.first + index.covered[row], length))


class Tape:
    """A layer alone, fed with keys and values that say which token they are of; the ops of a graph in their order."""

    def __init__(self, plan: Plan, batch: int = 2) -> None:
        self.cache = KVCache(plan, backend=named("sdpa"))
        self.layer = recalls(self.cache)[0]
        self.recall: Recall = self.layer.plan.recall  # type: ignore[assignment]
        self.columns, self.batch = torch.zeros(batch, 0, dtype=torch.long), batch
        self.made = torch.Generator().manual_seed(0)
        self.chosen: Any = None

    def states(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H_kv, Q, D]` of tokens, by sequence, head and position alone."""
        p = self.layer.plan
        b, h = torch.arange(self.batch).view(-1, 1, 1, 1), torch.arange(p.kv_heads).view(1, -1, 1, 1)
        d, at = torch.arange(1, p.key_dim + 1), positions.view(self.batch, 1, -1, 1)
        keys = torch.sin(0.37 * at * d + b + 2.0 * h) * 3
        values = torch.cos(0.11 * at * d[: p.value_dim] + b + 2.0 * h) * 3
        return keys, values

    def feed(self, count: int, prompt: bool, last: bool = True, pads: tuple[int, ...] = ()) -> Tensor:
        """One pass over `count` columns, the first `pads[b]` of them padding; what attention gives."""
        mask = torch.ones(self.batch, count, dtype=torch.long)
        for b, n in enumerate(pads):
            mask[b, :n] = 0
        self.columns = torch.cat((self.columns, mask), 1)
        self.cache.chunk(prompting=prompt, last=last)
        step = self.cache.begin(torch.zeros(self.batch, count, dtype=torch.long), self.columns)
        index, p = self.layer.plan.index, self.layer.plan
        if p.storage.offload:
            ops.fetch(step, index)
        keys, values = self.states(step.positions)
        kv = ops.kv_append(self.cache, keys, values, step, index)
        queries = torch.randn(self.batch, p.query_heads, count, p.key_dim, generator=self.made)
        self.queries, self.chosen = queries, ops.recall(queries, kv, step, index)
        out = ops.attend(queries, kv, step, index, chosen=self.chosen)
        ops.index(kv, step, index)
        ops.flush(kv, step, index)
        if p.storage.offload:
            ops.to_host(step, index)
        return out

    def chosen_row(self, row: int) -> list[int]:
        """The entries that a row read in the last pass."""
        return list(self.chosen)[row].tolist()
