"""Layers that attend in chunks (llama4_text): a chunk is what they see, what they hold, and what a selection is of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import family_config, family_model
from tiny import tiny_ids
from torch import Tensor

from kvcompile.adapters.architectures import describe
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.exporters.static.supports import refuse
from kvcompile.kernels import reference, sdpa
from kvcompile.kernels.cpp import sources as cpp
from kvcompile.kernels.dispatch import choose, serving
from kvcompile.kernels.layout import DenseView, Queries
from kvcompile.kernels.selfcheck.rows import Shape, draw
from kvcompile.kernels.spec import KernelSpec, plain
from kvcompile.kernels.triton import backend as triton
from kvcompile.plan.window import oldest
from kvcompile.stack import apply_stack, build_stack

CHUNK = 16
CPU = torch.device("cpu")
SPEC = KernelSpec(plain("dense", torch.float32), 2, 8, 8, 8**-0.5, sliding_window=CHUNK, chunked=True)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def compiled(kernels: str = "sdpa", **stack: Any) -> Any:
    model = family_model("llama4_text")
    return compile_plan(model, apply_stack(describe(model.config), build_stack(list(stack), stack)), kernels)


def stepped(model: Any, ids: Tensor, first: int) -> Tensor:
    """Logits of the last token of a prompt of `first`, and of those behind it one by one."""
    out = model(ids[:, :first], use_cache=True)
    rows = [out.logits[:, -1]]
    for token in ids[:, first:].unbind(1):
        out = model(token[:, None], past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[:, -1])
    return torch.stack(rows, 1)


def test_a_query_sees_its_chunk() -> None:
    """From its begin on, in the oracle and in the library, and nothing that a window of the same length would add."""
    assert [oldest(at, 16, chunked=True) for at in (0, 15, 16, 47)] == [0, 0, 16, 32]
    at = torch.tensor([[20]])
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 21, 8), torch.randn(1, 1, 21, 8)
    view = DenseView(k, v, torch.arange(21, dtype=torch.int32).view(1, 1, -1))
    expected = torch.einsum("hn,nd->hd", ((q[0, :, 0] @ k[0, 0, 16:].T) * SPEC.scale).softmax(-1), v[0, 0, 16:])
    for attend in (reference.attend, sdpa.attend):
        torch.testing.assert_close(attend(Queries(q, at), view, SPEC)[0, :, 0], expected)


@pytest.mark.parametrize("layout", ["dense", "ragged", "paged"])
@pytest.mark.parametrize("new", [1, 5, 24])
def test_the_library_agrees_with_the_oracle(layout: str, new: int) -> None:
    spec = KernelSpec(
        plain(layout, torch.float32, 16 if layout == "paged" else 0), 2, 8, 8, 0.3, sliding_window=9, chunked=True
    )
    sample = draw(spec, torch.float32, Shape(entries=24, new=new), CPU)
    expected = reference.attend(sample.queries, sample.view, spec)
    torch.testing.assert_close(sdpa.attend(sample.queries, sample.view, spec), expected, rtol=1e-4, atol=1e-5)


def test_no_kernel_without_chunks_is_asked() -> None:
    for generated in (cpp, triton):
        assert generated.supports(replace(SPEC, chunked=False), torch.float32)
        assert not generated.supports(SPEC, torch.float32)
    assert serving(choose("auto", CPU), SPEC, torch.float32).name == "sdpa"
    assert SPEC.name == "dense-float32-g2-d8-chunk16"


@pytest.mark.parametrize("first", [5, 15, 16, 17, 33])
@pytest.mark.parametrize("kernels", ["sdpa", "auto"])
def test_decoding_goes_on_over_the_ends_of_chunks(first: int, kernels: str) -> None:
    ids = tiny_ids(2, 40)
    expected = stepped(family_model("llama4_text"), ids, first)
    torch.testing.assert_close(stepped(compiled(kernels), ids, first), expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 40])
def test_what_is_held_is_the_chunk_of_the_last_token(tokens: int) -> None:
    """Its bytes are those of the plan; a selection keeps a part of it."""
    held = (tokens - 1) % CHUNK + 1
    for stack, kept in (({}, held), ({"streaming": {"budget": 8, "sinks": 2}}, min(8, held))):
        model = compiled(**stack)
        cache = model(tiny_ids(1, tokens)).past_key_values
        assert cache.nbytes() == sum(row.bytes for row in model.kvcompile.plan.bytes(1, tokens))
        assert cache.lengths()[0] == [kept] * 2
        assert model(tiny_ids(1, 1), past_key_values=cache).logits.isfinite().all()


def test_a_prompt_may_be_read_in_pieces() -> None:
    ids = tiny_ids(1, 40)
    model = family_model("llama4_text")
    plan = replace(describe(model.config), prefill_chunk=7)
    expected = family_model("llama4_text")(ids).logits[:, -1:]
    got = compile_plan(model, plan, "sdpa")(ids, logits_to_keep=1).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-5)


def test_programs_have_no_chunks() -> None:
    config = family_config("llama4_text")
    with pytest.raises(KvcompileError, match="attention in chunks"):
        refuse(describe(config), config)
