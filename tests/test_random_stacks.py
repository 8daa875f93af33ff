"""Any stack either compiles and generates, or is refused in one line that the user can mend."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal, get_args, get_origin

import torch
from contract_table import dense
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tiny import tiny_ids

from kvcompile.calibrator import shared
from kvcompile.compiler import assemble
from kvcompile.config import Config, finish
from kvcompile.errors import KvcompileError
from kvcompile.kernels.cpp import attention
from kvcompile.stack import discover, policy_class

TOKENS, PADS = 40, 13
NAMES = sorted(discover())
ARCHITECTURES = ("llama", "gemma2", "mistral", "gpt_neox")
WHOLE = st.sampled_from([1, 1, 2, 3, 5, 8, 9, 16, 24, 39, 40, 0, -1, 1000])
SHARES = st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.9, 1.0, 8.0, 24.0, 0.0, -1.0, 1.5, 1000.0])
HEADS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), max_size=3)
TEXT = st.sampled_from(["recency", "nonsense", *NAMES])
WRONG = st.sampled_from(["nonsense", -1, None, [7], [[0, 9]], float("nan"), float("inf"), 1 << 40])


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
def stacks(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Up to three policies in any order (often one), up to four fields of each, one in ten of them wrong."""
    names = draw(st.lists(st.sampled_from(NAMES), max_size=draw(st.sampled_from([1, 1, 2, 3])), unique=True))
    stack: dict[str, dict[str, Any]] = {}
    for name in names:
        cls = policy_class(name)
        hints = typing.get_type_hints(cls)
        fields = st.sampled_from([f.name for f in dataclasses.fields(cls)])
        stack[name] = {}
        for field in draw(st.lists(fields, max_size=4, unique=True)):
            wrong = draw(st.integers(0, 9)) == 9
            stack[name][field] = draw(WRONG if wrong else values(hints[field]))
    return stack


def write_kernels(cache: Any, dtype: torch.dtype) -> None:
    """The C++ of every layer, to the text: for one token and for many, before anything is encoded and after."""
    for p in cache.plan.layers:
        for spec in (*cache.first(p.index), *cache.expected(p.index)):
            for many in (False, True):
                assert attention.source(spec, dtype, many)


@settings(max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    stacks(),
    st.sampled_from([0, 0, 1, 7, 16, 64, -1]),
    st.sampled_from(ARCHITECTURES),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_a_random_stack_generates_or_is_refused_in_one_line(
    stack: dict[str, dict[str, Any]], chunk: int, architecture: str, dtype: torch.dtype, padded: bool
) -> None:
    original = dense(architecture)
    ids, mask = tiny_ids(2, TOKENS), torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, : PADS if padded else 0] = 0
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    try:
        # a compiler would take most of the time: kernels are written only
        config = finish(Config(stack=stack, prefill_chunk=chunk, kernels="sdpa"))
        model = assemble(shared(original).to(dtype), config)
        out = model.generate(ids, attention_mask=mask, **options)
        write_kernels(model.new_cache(), dtype)
    except KvcompileError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert out.shape == (2, TOKENS + 3)
    assert "\n" not in refusal
    assert len(refusal) < 400
    event("refused" if refusal else "generated")
