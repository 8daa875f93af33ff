"""The contract table: a row for each policy that selects or stores, and how a row becomes a compiled tiny model."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from kvcompile.adapters.architectures import describe
from kvcompile.compiler import compile_plan
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import Plan
from kvcompile.stack import apply_stack, build_stack
from kvcompile.stores.encoded.hadamard import turn_basis
from kvcompile.stores.factory import low as low_of

LAYERS, HEADS, DIM = 4, 2, 16  # of the tiny models (KV heads)
SINKS = 2


Options = dict[str, dict[str, Any]]  # fields by policy, in stack order


@dataclass(frozen=True)
class Row:
    """What the contract must know of a policy: the last one of `stack` that selects.

    stack: fields that suit a tiny model and budgets of `LEAST` tokens or more.
    split: the rows (KV heads) over which the budget is conserved: each head, the heads of a layer, those of all
    layers; `threshold`: there is no budget. whole: `(layer, head)` rows that keep everything beside the budget.
    recent: newest tokens that must stay (below 1: share of the budget). finds: what the needle oracle plants (None:
    the policy looks at nothing). everything: fields that keep all of a short prompt, besides a large budget.
    stored: policies that store or change what is kept, after the others; tiered: this one does itself, in two tiers.
    replays: the text is read again before a selection.
    error: how far stored keys and values may be from true ones (none is larger than 10; half a step of 8 bits over that
    is 0.04). logits: how far logits may be from the uncompressed model's, as root mean square over theirs, where
    everything is kept.
    """

    stack: Options
    split: Literal["head", "layer", "model", "threshold"] = "head"
    whole: tuple[tuple[int, int], ...] = ()
    recent: int | float = 0
    finds: Literal["attended", "different", "short"] | None = "attended"
    everything: dict[str, Any] = field(default_factory=dict)
    stored: Options = field(default_factory=dict)
    tiered: bool = False
    replays: bool = False
    error: float = 1e-5
    logits: float = 1e-5

    @property
    def policy(self) -> str:
        """The selecting policy that the row is about."""
        return list(self.stack)[-1]

    def fields(self, budget: float, **more: Any) -> Options:
        """The stack for this budget; it evicts after prefill and between chunks, unless `more` says otherwise."""
        budgeted = {} if self.split == "threshold" else {"budget": budget}
        return {
            **self.stack,
            self.policy: {"sinks": SINKS, "decode_every": 0, **self.stack[self.policy], **budgeted, **more},
            **self.stored,
        }

    @property
    def encoded(self) -> bool:
        """Whether what is kept is held in another number format than the model's."""
        return self.tiered or bool(self.stored)

    @property
    def rooms(self) -> int:
        """Places that keep room for the next tokens: codes have their own."""
        return 2 if self.encoded else 1

    def promised(self, budget: int, tokens: int) -> int:
        """Tokens that all rows of a tiny model together keep of `tokens`."""
        return (LAYERS * HEADS - len(self.whole)) * min(budget, tokens) + len(self.whole) * tokens

    def newest(self, budget: int) -> int:
        """How many of the newest tokens must stay."""
        return int(self.recent * budget) if self.recent < 1 else int(self.recent)


LEAST = 16  # the smallest budget that the options below allow
SNAPKV = {"window": 8, "kernel": 3}
KVZIP = {"recent": 4, "chunk": 16, "overlap": 3, "ids": [[5, 6], [7, 8, 9], [10]]}  # a text of 60 tokens in 4 pieces
FIT = {key: KVZIP[key] for key in ("recent", "chunk", "overlap", "ids")}
RETRIEVING = ((0, 1), (2, 0), (2, 1))
BITS8 = {"high": [8, 8], "low": [8, 8]}
KIVI8: Options = {"kivi": {"bits": 8, "group": 4, "residual": 8}}

# storage policies alone, with fields that suit 60 tokens, and how far logits may be off as above. Numbers by bits: a
# step is 1/255, 1/15 or (e4m3) 1/16 of the range, and four layers of random weights make about ten times that of it
STORED: dict[str, tuple[Options, float]] = {
    "kivi 8": (KIVI8, 0.02),
    "kivi 4": ({"kivi": {"bits": 4, "group": 8, "residual": 16}}, 0.3),
    "kivi K8V4": ({"kivi": {"key_bits": 8, "value_bits": 4, "group": 4, "residual": 0}}, 0.3),
    "int8": ({"int8": {"residual": 5}}, 0.03),
    "fp8": ({"fp8": {}}, 0.3),
    "nf4": ({"nf4": {"group": 8, "residual": 16}}, 0.45),  # levels near the largest lie 0.3 of it apart
    "kivi 8, paged": ({**KIVI8, "paged": {"page": 4}}, 0.02),
    "kivi 8, offloaded": ({**KIVI8, "offload": {"keep": 1}}, 0.02),
    "rotate, kivi": ({"rotate": {}, "kivi": {"bits": 8, "group": 8, "residual": 16}}, 0.02),
}

# structural stacks, for layers of one kind
STRUCTURES: dict[str, Options] = {
    "gqa": {"gqa": {}},
    "gqa, first": {"gqa": {"merge": "first"}},
    "mqa": {"mqa": {}},
    "mqa by similarity": {"mqa": {"merge": "similarity", "groups": [[[1, 0]]] * LAYERS}},
    "cla": {"cla": {}},
    "cla, dense front": {"cla": {"variant": "dense_front", "fold": "mean"}},
    "mlkv": {"mlkv": {"layers": 2}},
    "mla": {"mla": {"factor": "weights", "select": "uniform"}},
    "mla, low frequencies": {"mla": {"factor": "weights", "select": "low", "mix": False, "rope": 12, "rank": 14}},
    "gqa and cla": {"gqa": {}, "cla": {"pattern": [0, 0, 0, 3]}},
}

# those that divide layers and text, of models like llama: entries are blocks, which policies behind them count
DIVIDED: dict[str, Options] = {
    "block_transformer": {"block_transformer": {}},
    "block_transformer, lookup": {"block_transformer": {"block": 2, "split": 1, "embedder": "lookup", "expansion": 3}},
    "gqa, cla, block_transformer": {"gqa": {}, "cla": {}, "block_transformer": {}},
}

TABLE: dict[str, Row] = {
    "adakv": Row({"adakv": {}}, split="layer"),
    "attention_matching": Row(
        {"snapkv": SNAPKV},
        recent=8,
        replays=True,
        stored={"attention_matching": FIT},
        error=10.0,  # of keys too: what values must be stands in runtime/replay/test_refit.py
    ),
    "adakv over snapkv": Row({"snapkv": SNAPKV, "adakv": {"safeguard": 0.0}}, split="layer", recent=8),
    "corm": Row({"corm": {"window": 8, "recent": 4}}, split="threshold", recent=4, everything={"window": 200}),
    "dropkv": Row({"dropkv": {"window": 8}}, recent=8, finds=None),  # the planted values are all alike
    "expected_attention": Row({"expected_attention": {}}),
    "ghost": Row(
        {"ghost": {"chunk": 16, "recent": 4}}, recent=4, finds=None
    ),  # dropping one of equal values costs nothing
    "global_topk": Row({"ghost": {"chunk": 16, "recent": 4}, "global_topk": {}}, split="model", recent=4, finds=None),
    "global_topk over snapkv": Row({"snapkv": SNAPKV, "global_topk": {}}, split="model", recent=8),
    "global_topk, rotate, kivi": Row(
        {"ghost": {"chunk": 0, "band": 0, "recent": 4}, "global_topk": {}},
        split="model",
        recent=4,
        finds=None,
        stored={"rotate": {}, **KIVI8},
        error=0.05,
        logits=0.02,
    ),
    "head_budgets": Row(
        {"snapkv": SNAPKV, "head_budgets": {"shares": [[0.3, 0.1], [0.0, 0.2], [0.2, 0.0], [0.1, 0.1]]}},
        split="model",
        recent=8,
        finds=None,  # no room for a needle in heads without a share
    ),
    "h2o": Row({"h2o": {}}, recent=0.5),
    "keydiff": Row({"keydiff": {}}, finds="different"),
    "knorm": Row({"knorm": {}}, finds="short"),
    # the planted needle is in no text that could be read again
    "kvzip": Row({"kvzip": KVZIP}, recent=4, finds=None, replays=True),
    "kvzip, adakv": Row({"kvzip": KVZIP, "adakv": {}}, split="layer", recent=4, finds=None, replays=True),
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
    "adakv, kivi": Row({"adakv": {}}, split="layer", stored=KIVI8, error=0.05, logits=0.02),
    "zigzag, rotate, kivi": Row(
        {"snapkv": SNAPKV, "zigzag": {"window": 8}},
        split="model",
        recent=8,
        stored={"rotate": {}, **KIVI8},
        error=0.05,
        logits=0.02,
    ),
    "snapkv, int8": Row({"snapkv": SNAPKV}, recent=8, stored={"int8": {}}, error=0.05, logits=0.03),
    "adakv, paged": Row({"adakv": {}}, split="layer", stored={"paged": {}}),
    "tova, kivi, paged": Row({"tova": {}}, recent=1, stored={**KIVI8, "paged": {"page": 4}}, error=0.05, logits=0.02),
    "adakv, kivi, offload": Row({"adakv": {}}, split="layer", stored={**KIVI8, "offload": {}}, error=0.05, logits=0.02),
    "zigzag, offload": Row(
        {"snapkv": SNAPKV, "zigzag": {"window": 8}}, split="model", recent=8, stored={"offload": {}}
    ),
    "h2o, paged, offload": Row({"h2o": {}}, recent=0.5, stored={"paged": {}, "offload": {"keep": 1}}),
    # a tiny model spreads its attention: much of it lies between these thresholds. Half a step of 2 bits is 3.4
    "leankv": Row(
        {"leankv": {"alpha_high": 1.0, "alpha_low": 0.5, "recent": 8}},
        split="threshold",
        recent=8,
        everything={"alpha_high": 0.0, "alpha_low": 0.0},
        tiered=True,
        error=3.4,
        logits=0.3,
    ),
    "leankv by expected attention": Row(
        {"leankv": {**BITS8, "score": "expected_attention", "alpha_low": 0.5, "recent": 8}},
        split="threshold",
        recent=8,
        everything={"alpha_low": 0.0},
        tiered=True,
        error=0.05,
        logits=0.02,
    ),
    "tiers": Row({"tiers": {**BITS8, "recent": 4}}, recent=4, finds="attended", tiered=True, error=0.05, logits=0.02),
    "tiers over snapkv and adakv": Row(
        {"snapkv": SNAPKV, "adakv": {}, "tiers": {**BITS8, "recent": 8, "share": 0.5}},
        split="layer",
        recent=8,
        tiered=True,
        error=0.05,
        logits=0.02,
    ),
    "tiers by threshold": Row(
        {"tiers": {**BITS8, "alpha_high": 1.3, "alpha_low": 1.0, "recent": 8}},
        split="threshold",
        recent=8,
        everything={"alpha_low": 0.0},
        tiered=True,
        error=0.05,
        logits=0.02,
    ),
    "kvzip, rotate, kivi": Row(
        {"kvzip": {**KVZIP, "normalise": False}},
        recent=4,
        finds=None,
        replays=True,
        stored={"rotate": {}, **KIVI8},
        error=0.05,
        logits=0.02,
    ),
    "kvzip, global_topk": Row({"kvzip": KVZIP, "global_topk": {}}, split="model", recent=4, finds=None, replays=True),
    "kvzip, zigzag, paged, offload": Row(
        {"kvzip": KVZIP, "zigzag": {"window": 8}},
        split="model",
        recent=4,
        finds=None,
        replays=True,
        stored={"paged": {}, "offload": {}},
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


@functools.lru_cache(256)
def _compiled(stack: str, architecture: str, kernels: str, changes: tuple[tuple[str, Any], ...]) -> Any:
    plan = plan_of(json.loads(stack), architecture, **dict(changes))
    return compile_plan(shared(dense(architecture)), plan, kernels, tiny_tokenizer())


def compiled(stack: Options, architecture: str = "llama", kernels: str = "auto", **changes: Any) -> Any:
    """The tiny model compiled with a stack, built once: a test that changes it builds one of its own.

    A test of anything but attention asks for the kernels `sdpa`: no compiler runs.
    """
    return _compiled(json.dumps(stack), architecture, kernels, tuple(changes.items()))


def kept_positions(cache: Any) -> list[list[list[int]]]:
    """True positions held, per layer and row (sequence-major)."""
    return [[positions.tolist() for _, _, positions in layer.held.rows()] for layer in cache.layers]


def off(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what was expected."""
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def stored_bytes(cache: Any) -> list[int]:
    """What each layer must hold by its plan, from how many entries each row has."""
    return [
        sum(p.nbytes(n, "float32", low) for n, low in zip(layer.held.lengths, low_of(layer.held), strict=True))
        for p, layer in zip(cache.plan.layers, cache.layers, strict=True)
    ]


def true_rows(layer: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Keys, values and positions held by a layer's rows, out of the Hadamard basis."""
    if not layer.plan.storage.rotated:
        return layer.held.rows()
    return [(turn_basis(keys), turn_basis(values), positions) for keys, values, positions in layer.held.rows()]
