"""The contract table: one row for each selection policy, and how a row becomes a compiled tiny model."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tiny import tiny_model

from kvcompile.adapters.registry import describe
from kvcompile.calibrator import shared
from kvcompile.compiler import build
from kvcompile.plan import Plan
from kvcompile.stack import apply_stack, build_stack

LAYERS, HEADS, DIM = 4, 2, 16  # of the tiny models (KV heads)
SINKS = 2


Options = dict[str, dict[str, Any]]  # fields by policy, in stack order


@dataclass(frozen=True)
class Row:
    """What the contract must know of a policy: the last one of `stack`.

    stack: fields that suit a tiny model and budgets of `LEAST` tokens or more.
    split: the rows (KV heads) over which the budget is conserved: each head, the heads of a layer, those of all
    layers; `threshold`: there is no budget. whole: `(layer, head)` rows that keep everything beside the budget.
    recent: newest tokens that must stay (below 1: share of the budget). finds: what the needle oracle plants (None:
    the policy looks at nothing). everything: fields that keep all of a short prompt, besides a large budget.
    """

    stack: Options
    split: Literal["head", "layer", "model", "threshold"] = "head"
    whole: tuple[tuple[int, int], ...] = ()
    recent: int | float = 0
    finds: Literal["attended", "different", "short"] | None = "attended"
    everything: dict[str, Any] = field(default_factory=dict)

    @property
    def policy(self) -> str:
        """The policy that the row is about."""
        return list(self.stack)[-1]

    def fields(self, budget: float, **more: Any) -> Options:
        """The stack for this budget; it evicts after prefill and between chunks, unless `more` says otherwise."""
        budgeted = {} if self.split == "threshold" else {"budget": budget}
        return {
            **self.stack,
            self.policy: {"sinks": SINKS, "decode_every": 0, **self.stack[self.policy], **budgeted, **more},
        }

    def promised(self, budget: int, tokens: int) -> int:
        """Tokens that all rows of a tiny model together keep of `tokens`."""
        return (LAYERS * HEADS - len(self.whole)) * min(budget, tokens) + len(self.whole) * tokens

    def newest(self, budget: int) -> int:
        """How many of the newest tokens must stay."""
        return int(self.recent * budget) if self.recent < 1 else int(self.recent)


LEAST = 16  # the smallest budget that the options below allow
SNAPKV = {"window": 8, "kernel": 3}
RETRIEVING = ((0, 1), (2, 0), (2, 1))

# structural stacks, for layers of one kind
STRUCTURES: dict[str, Options] = {
    "gqa": {"gqa": {}},
    "gqa, first": {"gqa": {"merge": "first"}},
    "mqa": {"mqa": {}},
    "mqa by similarity": {"mqa": {"merge": "similarity", "groups": [[[1, 0]]] * LAYERS}},
    "cla": {"cla": {}},
    "cla, dense front": {"cla": {"variant": "dense_front", "fold": "mean"}},
    "mlkv": {"mlkv": {"layers": 2}},
    "gqa and cla": {"gqa": {}, "cla": {"pattern": [0, 0, 0, 3]}},
}

TABLE: dict[str, Row] = {
    "adakv": Row({"adakv": {}}, split="layer"),
    "adakv over snapkv": Row({"snapkv": SNAPKV, "adakv": {"safeguard": 0.0}}, split="layer", recent=8),
    "corm": Row({"corm": {"window": 8, "recent": 4}}, split="threshold", recent=4, everything={"window": 200}),
    "expected_attention": Row({"expected_attention": {}}),
    "h2o": Row({"h2o": {}}, recent=0.5),
    "keydiff": Row({"keydiff": {}}, finds="different"),
    "knorm": Row({"knorm": {}}, finds="short"),
    "pyramidkv": Row({"pyramidkv": {}}, split="model", recent=8, finds=None),  # no room for a needle in the last layer
    "pyramidkv over snapkv": Row({"snapkv": SNAPKV, "pyramidkv": {"beta": 2.0}}, split="model", recent=8),
    "random": Row({"random": {}}, finds=None),
    "retrieval_heads": Row(
        {"retrieval_heads": {"heads": [list(p) for p in RETRIEVING], "recent": 4}},
        whole=RETRIEVING,
        recent=4,
        finds=None,
    ),
    "snapkv": Row({"snapkv": SNAPKV}, recent=8),
    "streaming": Row({"streaming": {}}, recent=LEAST - SINKS, finds=None),
    "streaming, compact": Row({"streaming": {"positions": "compact"}}, recent=LEAST - SINKS, finds=None),
    "tova": Row({"tova": {}}, recent=1),
    "zigzag": Row({"snapkv": SNAPKV, "zigzag": {"window": 8}}, split="model", recent=8),
    "zigzag, adaptive": Row(
        {"expected_attention": {}, "zigzag": {"window": 8, "scope": "adaptive", "floor": 0.8}}, split="model"
    ),
    "zigzag by head": Row({"zigzag": {"window": 8, "score": "expected_attention", "scope": "head"}}, split="model"),
}


@functools.cache
def _dense(architecture: str) -> Any:
    return tiny_model(architecture)


def dense(architecture: str = "llama") -> Any:
    """The uncompressed tiny model of transformers."""
    return _dense(architecture)


def plan_of(stack: Options, architecture: str = "llama", **changes: Any) -> Plan:
    """The checked plan of a stack on a tiny model; `changes` are fields of the plan (`prefill_chunk`)."""
    plan = replace(describe(dense(architecture).config, "float32"), **changes)
    return apply_stack(plan, build_stack(list(stack), stack))


def compiled(stack: Options, architecture: str = "llama", **changes: Any) -> Any:
    """The tiny model compiled with a stack."""
    return build(shared(dense(architecture)), plan_of(stack, architecture, **changes))


def kept_positions(cache: Any) -> list[list[list[int]]]:
    """True positions held, per layer and row (sequence-major)."""
    return [[positions.tolist() for _, _, positions in layer.held.rows()] for layer in cache.layers]
