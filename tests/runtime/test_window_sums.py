"""Scores that average the attention of the last queries: a kernel adds it up, and nobody holds queries x entries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from contract_table import KIVI8, LAYERS, Options
from test_column_sums import alike, kept_positions_of, of_backend, run
from tiny import tiny_ids, tiny_model
from torch import Tensor

from kvcompile.adapters.architectures import describe
from kvcompile.compiler import compile_plan
from kvcompile.kernels import dispatch
from kvcompile.kernels.cpp import build as toolchain
from kvcompile.kernels.dispatch import CPP, REFERENCE, SDPA, TRITON
from kvcompile.kernels.spec import KernelSpec, plain
from kvcompile.runtime.observation import Observation
from kvcompile.stack import apply_stack, build_stack

pytestmark = pytest.mark.skipif(toolchain.available() is not None, reason="no C++ compiler here")

PROMPT, NEW = 51, 12
SNAPKV = {"window": 8, "kernel": 3, "budget": 0.4}
STACKS: dict[str, Options] = {
    "snapkv": {"snapkv": SNAPKV},
    "snapkv, while decoding": {"snapkv": {**SNAPKV, "budget": 20, "decode_every": 3}},
    "snapkv, adakv": {"snapkv": SNAPKV, "adakv": {}},
    "pyramidkv": {"pyramidkv": {"budget": 20}},
    "zigzag": {"snapkv": SNAPKV, "zigzag": {"window": 8}},
    "zigzag, two windows": {"snapkv": SNAPKV, "zigzag": {"window": 5, "scope": "head"}},
    "zigzag over means": {"expected_attention": {"budget": 0.4}, "zigzag": {"window": 7, "scope": "adaptive"}},
    "gqa, snapkv": {"gqa": {}, "snapkv": SNAPKV},
    "cla, snapkv": {"cla": {}, "snapkv": SNAPKV},
    "mla, snapkv": {"mla": {"factor": "weights", "select": "uniform"}, "snapkv": SNAPKV},
    "snapkv, adakv, paged": {"snapkv": SNAPKV, "adakv": {}, "paged": {"page": 4}},
    "zigzag, rotate, kivi": {"snapkv": SNAPKV, "zigzag": {"window": 8}, "rotate": {}, **KIVI8},
    "snapkv, offload": {"snapkv": SNAPKV, "offload": {}},
}


class Compared:
    """Every mean that a score asks for while this is in place, beside what queries and keys give."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: list[float] = []
        self.plain = 0
        given = Observation.mean_attention

        def both(seen: Observation) -> Tensor:
            got = given(seen)
            if seen.window_attention is None:
                self.plain += 1
            else:
                expected = given(replace(seen, window_attention=None))
                assert got.shape == expected.shape
                self.errors.append(float((got - expected).norm() / expected.norm()))
            return got

        monkeypatch.setattr(Observation, "mean_attention", both)


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The specs of the kernels' launches from now on, while they go on running."""
    specs: list[str] = []
    add = CPP.column_sums
    assert add is not None

    def counting(queries: Any, view: Any, spec: Any, sums: Tensor) -> None:
        specs.append(spec.name)
        add(queries, view, spec, sums)

    counted = replace(CPP, column_sums=counting)
    monkeypatch.setattr(dispatch, "CPP", counted)
    monkeypatch.setattr(dispatch, "BUILT_IN", (counted, *dispatch.BUILT_IN[1:]))
    return specs


@pytest.mark.parametrize("chunk", [0, 16])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_kernels_add_up_what_queries_and_keys_give(stack: Options, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch, after a prompt, between its chunks and while decoding: the same entries stay."""
    ids = tiny_ids(2, PROMPT + NEW)
    expected, _ = run(of_backend("sdpa", stack, prefill_chunk=chunk), ids, PROMPT)
    compared = Compared(monkeypatch)
    got, cache = run(of_backend("cpp", stack, prefill_chunk=chunk), ids, PROMPT)
    assert compared.errors
    assert not compared.plain
    # codes are decoded to float32 by both, in another order of operations
    assert max(compared.errors) < (2e-5 if cache.plan.layers[0].storage.quantized else 1e-6)
    assert alike(got, expected)
    assert any(cache.evictions.dropped.values())


@pytest.mark.parametrize("architecture", ["gemma2", "mistral", "gpt_oss"])
def test_windows_soft_caps_and_sinks(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, stack = tiny_ids(2, PROMPT + NEW), {"snapkv": {**SNAPKV, "decode_every": 4}}
    expected, _ = run(of_backend("sdpa", stack, architecture), ids, PROMPT)
    compared = Compared(monkeypatch)
    assert alike(run(of_backend("cpp", stack, architecture), ids, PROMPT)[0], expected)
    assert len(compared.errors) >= 2 * LAYERS
    assert not compared.plain
    assert max(compared.errors) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys are widened, nothing is rounded after that."""
    model = tiny_model().to(dtype)
    plan = describe(model.config, str(dtype).removeprefix("torch."))
    stack = STACKS["zigzag"]
    compiled = compile_plan(model, apply_stack(plan, build_stack(list(stack), stack)), kernels="cpp")
    compared = Compared(monkeypatch)
    with torch.no_grad():
        compiled(tiny_ids(2, PROMPT))
    assert len(compared.errors) == 2 * 2 * LAYERS
    assert max(compared.errors) < 1e-6


def test_a_layer_is_read_once_for_all_sequences_and_for_both_of_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = launched(monkeypatch)
    ids = tiny_ids(3, PROMPT)
    for name, times in (("snapkv", 1), ("zigzag", 1), ("zigzag, two windows", 2)):
        launches.clear()
        with torch.no_grad():
            of_backend("cpp", STACKS[name])(ids)
        assert launches == ["dense-float32-g2-d16-scores"] * times * LAYERS, name
    launches.clear()
    with torch.no_grad():
        of_backend("cpp", STACKS["snapkv"], prefill_chunk=17)(ids)
    assert len(launches) == 3 * LAYERS


def test_nobody_holds_queries_by_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(self: Observation, start: int = 0, stop: int | None = None) -> Tensor:
        raise AssertionError("attention is computed a second time")

    monkeypatch.setattr(Observation, "attention", asked)
    for name in ("snapkv", "zigzag", "pyramidkv"):
        run(of_backend("cpp", STACKS[name]), tiny_ids(2, PROMPT + 2), PROMPT)


def test_padding_the_largest_vote_and_other_backends_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel adds up what is asked for, the score looks at queries and keys, and the answer is the same."""
    ids, mask = tiny_ids(2, PROMPT), torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :17] = 0
    with torch.no_grad():
        expected = kept_positions_of(of_backend("sdpa", STACKS["zigzag"])(ids, attention_mask=mask).past_key_values)
        launches = launched(monkeypatch)
        got = kept_positions_of(of_backend("cpp", STACKS["zigzag"])(ids, attention_mask=mask).past_key_values)
        assert alike([got], [expected])
        of_backend("cpp", {"snapkv": {**SNAPKV, "reduce": "max"}})(ids)
        for backend in ("sdpa", "reference"):
            of_backend(backend, STACKS["snapkv"])(ids)
    assert not launches


def test_backends_say_whether_they_add_up() -> None:
    assert [each.column_sums is not None for each in (CPP, TRITON, REFERENCE, SDPA)] == [True, True, False, False]
    one = KernelSpec(plain("dense", "float64"), 2, 16, 16, 0.25, scores=True)
    assert not CPP.supports(one, torch.float64)
