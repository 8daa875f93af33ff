"""Two models, two threads, one kernel cache: everything comes out as if each had been alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from contract_table import KIVI8, Options, compiled, kept_positions
from tiny import tiny_ids
from torch import Tensor

from kvcompile.kernels.cpp import backend, build

PROMPT, NEW = 40, 40
STACKS: dict[str, Options] = {
    "adakv, kivi": {"adakv": {"budget": 24, "decode_every": 8}, **KIVI8},
    "zigzag, paged": {
        "snapkv": {"budget": 24, "window": 4, "kernel": 1, "decode_every": 8},
        "zigzag": {"window": 8},
        "paged": {"page": 4},
    },
    "streaming, compact": {"streaming": {"budget": 24, "positions": "compact", "decode_every": 8}},
    "h2o, kivi, paged, offload": {
        "h2o": {"budget": 24, "decode_every": 8},
        **KIVI8,
        "paged": {"page": 4},
        "offload": {"keep": 1},
    },
}
PAIRS = [("adakv, kivi", "zigzag, paged"), ("streaming, compact", "h2o, kivi, paged, offload")]


def said(model: Any, seed: int, padded: bool = True) -> tuple[Tensor, Any]:
    """What a model generates for a batch, and which positions it holds then."""
    ids = tiny_ids(2, PROMPT + seed)
    mask = torch.ones_like(ids)
    mask[1, : 7 if padded else 0] = 0
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    return out.sequences, kept_positions(out.past_key_values)


def alike(got: tuple[Tensor, Any], expected: tuple[Tensor, Any]) -> bool:
    return torch.equal(got[0], expected[0]) and got[1] == expected[1]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel cache that is empty, on disk and in this process."""
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "cache"))
    for name in ("_kernels", "_recent", "_building"):
        monkeypatch.setattr(backend, name, {})
    for name in ("_loaded", "_building"):
        monkeypatch.setattr(build, name, {})
    return tmp_path / "cache" / "kernels"


@pytest.mark.parametrize("pair", PAIRS, ids=" | ".join)
def test_two_models_in_two_threads_fill_one_kernel_cache(pair: tuple[str, str], fresh: Path) -> None:
    """Threads start at once, with nothing compiled; each round they meet again."""
    padded = "compact" not in pair[0]
    models = [compiled(STACKS[name]) for name in pair]
    gate = Barrier(2)

    def work(model: Any) -> list[tuple[Tensor, Any]]:
        rounds = []
        for seed in range(3):
            gate.wait(timeout=120)
            rounds.append(said(model, seed, padded))
        return rounds

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(work, models))
    built = sorted(path.name for path in fresh.glob("*.so"))
    for name, rounds in zip(pair, together, strict=True):
        model = compiled(STACKS[name])
        assert all(alike(got, said(model, seed, padded)) for seed, got in enumerate(rounds))
    assert sorted(path.name for path in fresh.glob("*.so")) == built, "alone, no other kernel is needed"
    assert built or build.available() is not None
    assert not list(fresh.glob(".making-*"))


@pytest.mark.parametrize("name", STACKS)
def test_one_model_in_two_threads(name: str) -> None:
    """Each call has a cache of its own; the model holds nothing that changes."""
    model, padded, gate = compiled(STACKS[name]), "compact" not in name, Barrier(2)
    expected = [said(model, seed, padded) for seed in range(2)]

    def work(seed: int) -> bool:
        gate.wait(timeout=120)
        return all(alike(said(model, seed, padded), expected[seed]) for _ in range(2))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


@pytest.mark.parametrize("name", STACKS)
def test_two_caches_of_one_model_in_turns(name: str) -> None:
    """A token for one, a token for the other, of different lengths: neither notices."""
    model = compiled(STACKS[name])
    texts = [tiny_ids(2, PROMPT + NEW), tiny_ids(1, PROMPT + NEW + 13)[:, 13:].flip(1)]
    prompts = [PROMPT, PROMPT - 9]

    def step(cache: Any, text: Tensor, at: int, count: int = 1) -> Tensor:
        with torch.no_grad():
            return model(text[:, at : at + count], past_key_values=cache).logits

    def alone(text: Tensor, prompt: int) -> tuple[list[Tensor], Any]:
        cache = model.new_cache()
        logits = [step(cache, text, 0, prompt), *(step(cache, text, t) for t in range(prompt, prompt + NEW))]
        return logits, cache

    expected = [alone(*given) for given in zip(texts, prompts, strict=True)]
    caches = [model.new_cache() for _ in texts]
    got = [[step(cache, text, 0, n)] for cache, text, n in zip(caches, texts, prompts, strict=True)]
    for t in range(NEW):
        for logits, cache, text, prompt in zip(got, caches, texts, prompts, strict=True):
            logits.append(step(cache, text, prompt + t))
    for logits, cache, (others, other) in zip(got, caches, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(logits, others, strict=True))
        assert kept_positions(cache) == kept_positions(other)
        assert cache.evictions == other.evictions
