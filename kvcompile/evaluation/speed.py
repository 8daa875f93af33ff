"""Prefill time, decode speed and cache size of models, taken in turns so that a noisy machine wrongs none of them."""

from __future__ import annotations

import ctypes
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.evaluation.perplexity import forward

WARM_UP = 2  # decode steps run before any is timed
GLANCE = 0.005  # seconds between two looks at the resident memory


@dataclass(frozen=True)
class Speed:
    """Timings of one model: seconds, tokens a second of the whole batch, bytes.

    prefill_s: median of the rounds. step_s: median decode step, step_min_s the fastest; of a block transformer, whose
    steps differ, of their means over a block. cache_bytes: after prefill.
    read_again: tokens that a replay read in a prefill, its prompts included, over the whole batch.
    peak_bytes: growth of memory over the start of a prefill, on CPU of the process's resident set (approximate).
    """

    batch: int
    context: int
    new_tokens: int
    prefill_s: float
    step_s: float
    step_min_s: float
    cache_bytes: int
    peak_bytes: int
    read_again: int = 0

    @property
    def decode_tokens_s(self) -> float:
        """Tokens decoded a second, at the median step."""
        return self.batch / self.step_s


@dataclass(frozen=True)
class Round:
    """One prefill and the decode steps after it."""

    prefill_s: float
    steps: tuple[float, ...]
    cache_bytes: int
    read_again: int


@dataclass(frozen=True)
class Comparison:
    """Speeds by name and, against the first one, ratios above 1 for the better: medians of the ratios of each round."""

    speeds: dict[str, Speed]
    decode_ratio: dict[str, float]
    prefill_ratio: dict[str, float]
    cache_ratio: dict[str, float]


def measure(model: Any, ids: Tensor, new_tokens: int, rounds: int = 1) -> Speed:
    """Speed of one model on the prompt `ids [B, T]`, greedy, after a warm-up. Raises KvcompileError for empty input."""
    return compare({"model": model}, ids, new_tokens, rounds).speeds["model"]


def compare(models: Mapping[str, Any], ids: Tensor, new_tokens: int, rounds: int = 3) -> Comparison:
    """Measure the models in turns, `rounds` times, in this process; the first one is the baseline of the ratios.

    Each round begins with another model, so that none is always the one after a pause.
    """
    if not models or ids.ndim != 2 or not ids.numel() or min(new_tokens, rounds) < 1:
        raise KvcompileError(
            "a speed measurement needs models, ids [B, T] and 1 or more new tokens and rounds",
            f"{len(models)} models, ids {list(ids.shape)}, {new_tokens} tokens, {rounds} rounds",
        )
    peaks = {name: _peak_of_warm_up(model, ids) for name, model in models.items()}
    taken: dict[str, list[Round]] = {name: [] for name in models}
    order = list(models)
    for _ in range(rounds):
        for name in order:
            taken[name].append(_round(models[name], ids, new_tokens))
        order = [*order[1:], order[0]]
    base = next(iter(taken.values()))

    def ratios(of: Callable[[Round], float]) -> dict[str, float]:
        return {
            name: statistics.median(of(b) / of(r) if of(r) else float("inf") for b, r in zip(base, rounds, strict=True))
            for name, rounds in taken.items()
        }

    return Comparison(
        {name: _summary(ids, new_tokens, rounds, peaks[name]) for name, rounds in taken.items()},
        decode_ratio=ratios(lambda r: statistics.median(r.steps)),
        prefill_ratio=ratios(lambda r: r.prefill_s),
        cache_ratio=ratios(lambda r: r.cache_bytes),
    )


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values a cache holds: what it says itself, or the sum over a transformers cache's layers."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    tensors = (t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None)
    return sum(t.numel() * t.element_size() for t in tensors)


def _summary(ids: Tensor, new_tokens: int, rounds: list[Round], peak: int) -> Speed:
    steps = [s for r in rounds for s in r.steps]
    return Speed(
        batch=ids.shape[0],
        context=ids.shape[1],
        new_tokens=new_tokens,
        prefill_s=statistics.median(r.prefill_s for r in rounds),
        step_s=statistics.median(steps),
        step_min_s=min(steps),
        cache_bytes=rounds[-1].cache_bytes,
        peak_bytes=peak,
        read_again=rounds[-1].read_again,
    )


@torch.inference_mode()
def _round(model: Any, ids: Tensor, new_tokens: int) -> Round:
    """Prefill and greedy decode; the clock stops after the device has finished."""
    ids = ids.to(model.device)
    start = _now(ids)
    logits, cache = forward(model, ids)
    prefill = _now(ids) - start
    nbytes, read_again = cache_bytes(cache), getattr(cache, "read_again", 0)
    steps = []
    for _ in range(new_tokens):
        start = _now(ids)
        logits, cache = forward(model, logits.argmax(-1, keepdim=True), cache)
        steps.append(_now(ids) - start)
    return Round(prefill, tuple(_over_blocks(steps, _block(model))), nbytes, read_again)


def _block(model: Any) -> int:
    """Tokens in which a model's steps repeat: those of a block of a block transformer, else 1."""
    compiled = getattr(model, "kvcompile", None)
    return 1 if compiled is None or compiled.plan.blocks is None else int(compiled.plan.blocks.length)


def _over_blocks(steps: list[float], length: int) -> list[float]:
    """Means over `length` steps each, what is left at the end dropped; of fewer steps, their mean."""
    if len(steps) < length:
        return [statistics.fmean(steps)]
    return [statistics.fmean(steps[i : i + length]) for i in range(0, len(steps) - length + 1, length)]


def _now(on: Tensor) -> float:
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    return time.perf_counter()


@torch.inference_mode()
def _peak_of_warm_up(model: Any, ids: Tensor) -> int:
    """Peak memory of the warm-up, so that watching it disturbs no timing."""
    ids = ids.to(model.device)
    with _peak(ids) as read:
        logits, cache = forward(model, ids)
        for _ in range(WARM_UP):
            logits, cache = forward(model, logits.argmax(-1, keepdim=True), cache)
        return read()


@contextmanager
def _peak(on: Tensor) -> Iterator[Callable[[], int]]:
    """Gives a function that says by how many bytes memory has grown at most since the start."""
    if on.is_cuda:
        before = torch.cuda.memory_allocated(on.device)
        torch.cuda.reset_peak_memory_stats(on.device)
        yield lambda: torch.cuda.max_memory_allocated(on.device) - before
        return
    _give_back()
    process, done = psutil.Process(), threading.Event()
    before = most = int(process.memory_info().rss)

    def measure() -> int:
        nonlocal most
        most = max(most, int(process.memory_info().rss))
        return most - before

    def sample() -> None:
        while not done.wait(GLANCE):
            measure()

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield measure
    finally:
        done.set()
        sampler.join()


def _give_back() -> None:
    """Return what the allocator keeps of freed memory, so that using it again counts as growth (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
