"""Random cases for the compiler: a family, a dtype, a stack with random options, a backend, a padded batch; how each
is compiled and run. What must hold of them stands in `test_random_stacks*.py`.

Policies and options come from the registry and the fields of each dataclass: a new policy is drawn without a line here.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import typing
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import torch
from contract_table import dense
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, tiny_ids
from torch import Tensor

from kvcompile.compiler import assemble
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import ORDER
from kvcompile.stack import build_policy, discover, policy_class

ROUTED = ("mixtral", "gpt_oss")  # in 16 bits a rounded number may send a token to another expert
EXAMPLES = int(os.environ.get("KVCOMPILE_EXAMPLES", "0"))  # 0: those of every run, always the same ones
random_examples = settings(
    max_examples=EXAMPLES or 250,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

NAMES = sorted(discover())
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# how far logits may be off, as root mean square over theirs, where only the order of sums differs
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02, "float64": 1e-6}
BACKENDS, LENGTHS = ["sdpa", "sdpa", "sdpa", "reference", "reference", "cpp"], [1, 2, 9, 24, 31, 40, 52]
NEW = [2, 3, 5, 34]  # 34: every layer has encoded what was decoded
if os.environ.get("TRITON_INTERPRET") == "1":  # a second or more for each kernel call
    BACKENDS, LENGTHS, NEW = ["triton"], [1, 2, 9], [2]

WHOLE = st.sampled_from([1, 1, 2, 3, 4, 5, 8, 9, 16, 24, 39, 40, 0, -1, 1000])
SHARES = st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.9, 1.0, 8.0, 16.0, 24.0, 0.0, -1.0, 1.5, 1000.0])
HEADS = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), max_size=3)
TEXT = st.sampled_from(["recency", "nonsense", *NAMES])
WRONG = st.sampled_from(["nonsense", -1, None, [7], [[0, 9]], float("nan"), float("inf"), 1 << 40])

Stack = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One compile, and the batch that runs through it.

    lengths: prompt tokens of each sequence, padded on the side `padding`; new: tokens decoded after them.
    """

    family: str
    dtype: str
    stack: Stack
    chunk: int
    backend: str
    lengths: tuple[int, ...]
    padding: Literal["left", "right"]
    new: int

    @property
    def width(self) -> int:
        """Columns of the padded prompts."""
        return max(self.lengths)

    @property
    def exact(self) -> bool:
        """Whether sums in another order cannot choose other tokens or experts: 16 bits are too coarse for that."""
        return self.dtype in ("float32", "float64")


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values for a field of this type, most of them in range."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin is list:
        return HEADS if get_origin(inner[0]) is list else st.lists(st.integers(0, 3), max_size=3)
    if inner:
        return st.one_of(*[st.none() if h is type(None) else values(h) for h in inner])
    if hint is bool:
        return st.booleans()
    if hint is int:
        return WHOLE
    return TEXT if hint is str else SHARES


@st.composite
def options(draw: st.DrawFn, name: str, wrong: bool) -> dict[str, Any]:
    """Up to four fields of a policy; values that it refuses are left out, unless they are `wrong` on purpose."""
    cls = policy_class(name)
    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for field in draw(st.lists(st.sampled_from([f.name for f in dataclasses.fields(cls)]), max_size=4, unique=True)):
        value = draw(WRONG if wrong else values(hints[field]))
        if wrong or _accepted(name, {**found, field: value}):
            found[field] = value
    return found


def _accepted(name: str, fields: dict[str, Any]) -> bool:
    try:
        build_policy(name, fields)
    except KvcompileError:
        return False
    return True


@st.composite
def stacks(draw: st.DrawFn) -> Stack:
    """Up to four policies (often one or two), mostly in a legal order, a quarter of them selections of the whole."""
    whole = draw(st.integers(0, 3)) == 3
    known = [name for name in NAMES if policy_class(name).family == "selection"] if whole else NAMES
    names = draw(st.lists(st.sampled_from(known), max_size=draw(st.sampled_from([1, 2, 2, 3, 4])), unique=True))
    if draw(st.integers(0, 9)) < 9:
        names.sort(key=lambda name: ORDER.index(policy_class(name).family))
    stack = {name: draw(options(name, wrong=draw(st.integers(0, 29)) == 29)) for name in names}
    for name in names if whole else ():
        if "budget" in {f.name for f in dataclasses.fields(policy_class(name))}:
            stack[name]["budget"] = 1.0
    return stack


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case; prompts are shorter than the windows of sliding layers as well as longer."""
    family = draw(st.sampled_from(ARCHITECTURES))
    # transformers multiplies the experts of these in float64 on no CPU
    wide = [] if family in ROUTED else ["float64"]
    return Case(
        family=family,
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16", "float16", *wide])),
        stack=draw(stacks()),
        chunk=draw(st.sampled_from([0, 0, 0, 1, 7, 16, 64])),
        backend=draw(st.sampled_from(BACKENDS)),
        lengths=tuple(draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=3))),
        padding=draw(st.sampled_from(["left", "left", "right"])),
        new=draw(st.sampled_from(NEW)),
    )


@functools.cache
def original(family: str, dtype: str) -> Any:
    """The uncompressed tiny model in a dtype, rotary frequencies in float32 as a checkpoint gives them."""
    model = copy.deepcopy(dense(family))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    return model


def compiled(case: Case, backend: str = "") -> Any:
    """The compiled model of a case; None where it is refused: in one line, the original untouched."""
    model, refusal = shared(original(case.family, case.dtype)), ""
    before = fingerprint(model)
    try:
        config = finish(Config(stack=case.stack, prefill_chunk=case.chunk, kernels=backend or case.backend))
        return assemble(model, config)
    except KvcompileError as error:
        refusal = str(error)
    assert fingerprint(model) == before, f"changed, then refused: {refusal}"
    assert "\n" not in refusal
    assert len(refusal) < 400
    return None


def fingerprint(model: Any) -> list[Any]:
    """What a compile changes of a model: its modules, and which memory its weights lie in."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return [*modules, *((name, p.data_ptr(), tuple(p.shape)) for name, p in model.named_parameters())]


def tokens(case: Case) -> Tensor:
    """Prompts and what is decoded after them, `[B, width + new]`; sequence b begins at column 0."""
    return tiny_ids(len(case.lengths), case.width + case.new, seed=3)


def prompts(case: Case, rows: list[int]) -> tuple[Tensor, Tensor]:
    """The padded prompts of some sequences, `[b, n]`, and their mask."""
    width = max(case.lengths[b] for b in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, b in enumerate(rows):
        n = case.lengths[b]
        at = slice(width - n, width) if case.padding == "left" else slice(0, n)
        ids[row, at], mask[row, at] = tokens(case)[b, :n], 1
    return ids, mask


@torch.no_grad()
def prefilled(model: Any, case: Case, rows: list[int]) -> tuple[Tensor, Any]:
    """Logits after the prompts of these sequences, `[b, 1, vocabulary]`, and the cache."""
    ids, mask = prompts(case, rows)
    out = model(ids, attention_mask=mask, use_cache=True)
    last = mask.cumsum(1).argmax(1)
    return out.logits[torch.arange(len(rows)), last].unsqueeze(1), out.past_key_values


@torch.no_grad()
def decoded(model: Any, case: Case, rows: list[int], cache: Any) -> Tensor:
    """Logits after each decoded token, `[b, new, vocabulary]`."""
    _, mask = prompts(case, rows)
    logits = []
    for i in range(case.new):
        new = torch.stack([tokens(case)[b, case.lengths[b] + i] for b in rows]).unsqueeze(1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        logits.append(model(new, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


def run(model: Any, case: Case, rows: list[int] | None = None) -> tuple[Tensor, Any]:
    """`prefilled`, then `decoded`: logits `[b, 1 + new, vocabulary]`, and the cache at the end."""
    rows = list(range(len(case.lengths))) if rows is None else rows
    first, cache = prefilled(model, case, rows)
    return torch.cat([first, decoded(model, case, rows, cache)], 1), cache


@torch.no_grad()
def uncompressed(case: Case, b: int) -> Tensor:
    """The logits of `run` for sequence b as transformers has them, in one pass without a cache."""
    n = case.lengths[b]
    return original(case.family, case.dtype)(tokens(case)[b : b + 1, : n + case.new]).logits[:, n - 1 :]


def kept(cache: Any, b: int, batch: int) -> list[list[list[int]]]:
    """True positions that sequence b holds, per layer and KV head; nothing for layers without a cache, or no entry yet.

    Where a recall may put entries elsewhere, in ascending order.
    """
    rows = [[] if layer.store is None else [at.tolist() for _, _, at in layer.held.rows()] for layer in cache.layers]
    rows = [[sorted(at) for at in r] if p.recall else r for r, p in zip(rows, cache.plan.layers, strict=True)]
    own = [layer[len(layer) // batch * b : len(layer) // batch * (b + 1)] for layer in rows]
    return [layer if any(layer) else [] for layer in own]


def tolerance(case: Case, cache: Any) -> float:
    """How far logits may be off where only the order of sums differs; a number may also round to the next code."""
    return TOLERANCE[case.dtype] + 0.05 * any(p.storage.quantized for p in cache.plan.layers)


def comparable(case: Case, cache: Any) -> bool:
    """Whether sums in another order cannot choose other experts, or other groups of tokens to read, of one cache."""
    plan = cache.plan
    recalls, encodes = any(p.recall for p in plan.layers), any(p.storage.quantized for p in plan.layers)
    if case.exact:
        return not (recalls and encodes)  # another code now and then, by which another group is read
    return case.family not in ROUTED and not recalls


def off(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what was expected."""
    got, expected = got.double(), expected.double()
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
