"""Scores that are sums of attention: the kernel adds them up, and what is kept is what asking again would keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from contract_table import KIVI8, LAYERS, Options, dense, kept_positions, plan_of
from tiny import tiny_ids
from torch import Tensor

from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.kernels.dispatch import choose, named
from kvcompile.kernels.spec import KernelSpec, plain
from kvcompile.models.sharing import shared
from kvcompile.runtime import eviction
from kvcompile.runtime.cache import KVCache
from kvcompile.runtime.observation import Observation

PROMPT, NEW = 50, 30
SUMMING = sorted({"reference", choose("auto").name} - {"sdpa"})
H2O: Options = {"h2o": {"budget": 20, "decode_every": 4}}
STACKS: dict[str, Options] = {
    "h2o": H2O,
    "h2o, every token": {"h2o": {"budget": 20, "decode_every": 1}},
    "h2o, adakv, paged": {**H2O, "adakv": {}, "paged": {"page": 4}},
    "h2o, zigzag, offload": {**H2O, "zigzag": {"window": 8}, "offload": {}},
    "cla, h2o": {"cla": {}, **H2O},
    "tova": {"tova": {"budget": 20}},
    "tova, adakv": {"tova": {"budget": 20, "decode_every": 3}, "adakv": {}},
    "cla, tova": {"cla": {}, "tova": {"budget": 20}},
}
every = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)


def of_backend(backend: str, stack: Options, architecture: str = "llama", **changes: Any) -> Any:
    return compile_plan(shared(dense(architecture)), plan_of(stack, architecture, **changes), kernels=backend)


def run(model: Any, ids: Tensor, prompt: int = PROMPT) -> tuple[list[Any], KVCache]:
    """What is held after the prompt and after each token."""
    with torch.no_grad():
        cache = model(ids[:, :prompt]).past_key_values
        held = [kept_positions_of(cache)]
        for t in range(prompt, ids.shape[1]):
            model(ids[:, t : t + 1], past_key_values=cache)
            held.append(kept_positions_of(cache))
    return held, cache


def kept_positions_of(cache: KVCache) -> list[Any]:
    return [[at.tolist() for _, _, at in layer.held.rows()] for layer in cache.layers if layer.store is not None]


def alike(got: list[Any], expected: list[Any]) -> bool:
    """The same entries, but for one in a hundred: rounding decides between two that are as good as equal."""
    rows = [
        (set(mine), set(theirs))
        for found, wanted in zip(got, expected, strict=True)
        for layer, other in zip(found, wanted, strict=True)
        for mine, theirs in zip(layer, other, strict=True)
    ]
    lengths_equal = all(len(mine) == len(theirs) for mine, theirs in rows)
    common, held = (sum(len(x) for x in part) for part in ([a & b for a, b in rows], [a for a, _ in rows]))
    return lengths_equal and common >= 0.99 * held


@pytest.mark.parametrize("backend", SUMMING)
@pytest.mark.parametrize("chunk", [0, 16])
@every
def test_selections_are_those_of_asking_again(stack: Options, chunk: int, backend: str) -> None:
    """Token by token, at prefill, between its chunks and while decoding."""
    ids = tiny_ids(2, PROMPT + NEW)
    expected, asked = run(of_backend("sdpa", stack, prefill_chunk=chunk), ids)
    got, cache = run(of_backend(backend, stack, prefill_chunk=chunk), ids)
    assert got == expected
    assert cache.evictions == asked.evictions
    assert any(spec.scores for spec in cache.kernels.specs.values())
    assert not any(spec.scores for spec in asked.kernels.specs.values())
    for mine, theirs in zip(cache.layers, asked.layers, strict=True):
        for x, y in zip(mine.history.carried or [], theirs.history.carried or [], strict=False):
            width = min(x.shape[1], y.shape[1])
            torch.testing.assert_close(x[:, :width], y[:, :width], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", SUMMING)
@pytest.mark.parametrize("architecture", ["gemma2", "mistral", "gpt_oss"])
@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_windows_soft_caps_and_sinks(
    name: str, architecture: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that leave a window are freed between two looks: sums follow what is left."""
    monkeypatch.setattr(eviction, "TRIM_EVERY", 2)
    stack = {name: {"budget": 20, "decode_every": 8}}
    ids = tiny_ids(2, PROMPT + NEW)
    expected, _ = run(of_backend("sdpa", stack, architecture), ids)
    assert alike(run(of_backend(backend, stack, architecture), ids)[0], expected)


@pytest.mark.parametrize("backend", SUMMING)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["h2o", "tova", "h2o, zigzag, offload"])
def test_padded_batches_and_beams(name: str, beams: int, backend: str) -> None:
    ids, mask = tiny_ids(2, PROMPT), torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :17] = 0
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    out = [
        of_backend(way, STACKS[name]).generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
        for way in ("sdpa", backend)
    ]
    assert torch.equal(out[0].sequences, out[1].sequences)
    assert kept_positions(out[0].past_key_values) == kept_positions(out[1].past_key_values)


@pytest.mark.parametrize("backend", SUMMING)
@every
def test_nobody_is_asked_again_while_decoding(stack: Options, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No attention beside the kernel's, and no query is kept for a sum over all of them."""
    ids, model = tiny_ids(2, PROMPT + NEW), of_backend(backend, stack)
    with torch.no_grad():
        cache = model(ids[:, :PROMPT]).past_key_values

        def asked(self: Observation, start: int = 0, stop: int | None = None) -> Tensor:
            assert not self.queries.shape[2] or "zigzag" in stack, "attention is computed a second time"
            return whole(self, start, stop)

        whole = Observation.attention
        monkeypatch.setattr(Observation, "attention", asked)
        for t in range(PROMPT, ids.shape[1]):
            model(ids[:, t : t + 1], past_key_values=cache)
    assert cache.evictions.events > LAYERS
    if "h2o" in stack and "zigzag" not in stack:
        assert not any(layer.history.segments for layer in cache.layers)


@pytest.mark.parametrize("backend", SUMMING)
def test_codes_are_scored_as_they_were_attended(backend: str) -> None:
    """Sums are of the attention that there was; asking again would meet what has been encoded since."""
    ids = tiny_ids(2, PROMPT + NEW)
    stack = {**H2O, **KIVI8}
    expected, _ = run(of_backend("reference", stack), ids)
    assert run(of_backend(backend, stack), ids)[0] == expected


def test_what_is_in_a_sum_cannot_be_taken_back() -> None:
    for backend in SUMMING:
        model = of_backend(backend, {"h2o": {"budget": 1.0, "decode_every": 100}})
        with torch.no_grad():
            cache = model(tiny_ids(1, PROMPT)).past_key_values
            model(tiny_ids(1, 1), past_key_values=cache)
        with pytest.raises(KvcompileError, match="only tokens after the last eviction"):
            cache.crop(-1)


def test_backends_say_whether_they_sum() -> None:
    one = KernelSpec(plain("dense", "float32"), 2, 16, 16, 0.25, scores=True)
    assert [named(name).supports(one, torch.float32) for name in ("cpp", "triton", "reference", "sdpa")] == [1, 1, 1, 0]
    assert not named("cpp").supports(replace(one, parts=plain("dense", "float64")), torch.float64)
    for backend in SUMMING:
        for decode_every in (0, 4):
            cache = of_backend(backend, {"h2o": {"decode_every": decode_every}}).new_cache()
            assert {"-scores" in spec.name for spec in cache.kernels.expected(0)} == {bool(decode_every)}
