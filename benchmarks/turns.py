"""Timing in turns for a foreign process: nothing but torch, so that any environment can import it.

A contestant is `start(ids) -> (logits, state)` and `step(token, state) -> logits`; both give logits `[1, vocabulary]`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch


@dataclass(frozen=True)
class Contestant:
    """A way to run the model; `size(state)` are the bytes of keys and values that it holds."""

    start: Callable[[torch.Tensor], tuple[torch.Tensor, Any]]
    step: Callable[[torch.Tensor, Any], torch.Tensor]
    size: Callable[[Any], int]


def tensors_bytes(*roots: Any) -> int:
    """Bytes of all distinct tensors reachable from the roots through lists, dicts and attributes."""
    seen: set[int] = set()
    total, stack = 0, list(roots)
    while stack:
        x = stack.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            total += x.numel() * x.element_size()
        elif isinstance(x, dict):
            stack += x.values()
        elif isinstance(x, list | tuple):
            stack += x
        elif hasattr(x, "__dict__") and not isinstance(x, type | torch.nn.Module):
            stack += vars(x).values()
    return total


STEPS = 4  # of one contestant at a time; the first one finds the caches of the processor as another left them


@torch.inference_mode()
def race(contestants: dict[str, Contestant], ids: torch.Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Prefill seconds (once), median decode step (ms) and bytes of each; steps in turns, in another order each round.

    `decode x`: the median over the rounds of the first one's median step to this one's.
    """
    states, prefills, sizes = {}, {}, {}
    for name, c in contestants.items():
        c.start(ids[:, :256])  # what is made or compiled when it is first used
        begin = time.perf_counter()
        states[name] = c.start(ids)
        prefills[name] = time.perf_counter() - begin
        sizes[name] = c.size(states[name][1])
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    shuffle = Random(0)
    for round_ in range(rounds + 1):  # the first one warms up
        for name, c in shuffle.sample(list(contestants.items()), len(contestants)):
            logits, state = states[name]
            steps = []
            for _ in range(STEPS):
                token = logits.argmax(-1, keepdim=True)
                begin = time.perf_counter()
                logits = c.step(token, state)
                steps.append(time.perf_counter() - begin)
            states[name] = logits, state
            if round_:
                taken[name].append(statistics.median(steps))
    base = next(iter(taken.values()))
    return {
        name: {
            "prefill s": prefills[name],
            "decode ms": 1000 * statistics.median(mine),
            "decode x": statistics.median(b / m for b, m in zip(base, mine, strict=True)),
            "cache MB": sizes[name] / 1e6,
        }
        for name, mine in taken.items()
    }


@torch.inference_mode()
def found(c: Contestant, prompts: list[dict[str, Any]], decode: Callable[[list[int]], str], count: int = 12) -> float:
    """Share of needle prompts (`ids`, `answer`) whose greedy answer contains the number."""
    right = 0
    for prompt in prompts:
        logits, state = c.start(torch.tensor([prompt["ids"]]))
        said = []
        for _ in range(count):
            token = logits.argmax(-1, keepdim=True)
            said.append(int(token))
            logits = c.step(token, state)
        right += prompt["answer"] in decode(said)
    return right / len(prompts)
