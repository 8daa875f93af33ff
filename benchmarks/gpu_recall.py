"""Decode of a model that reads a part of what it keeps, on a GPU, from its memory or the host's, beside dense ones.

    python benchmarks/gpu_recall.py --out benchmarks/results/gpu_recall
    TRITON_INTERPRET=1 python benchmarks/gpu_recall.py --device cpu --gate --layers 2      # the gate alone

Layers of the shape of a model of 1B (32 query heads over 8 of 64 channels, random weights, float16). `offload`: keys
and values lie in pinned host memory; dense brings all of them for each layer of each step, a recall what it chose. The
gate: over a short prompt, each stack that chooses everything decodes with Triton what it does with the float64
reference (fewer would be others where scores are as good as equal), and a stack that chooses few decodes from host
memory to the bit what it does on the device. ms: median step by CUDA events, steps in turns. MB: keys and values held
on the device and in host memory, what a step reads, and what it moves from one to the other, counted on live caches.
Nothing here has been measured yet: no GPU was available when it was written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from statistics import median
from typing import Any

import torch
from tables import show
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvcompile.build import plan_of
from kvcompile.compiler import compile_plan
from kvcompile.config.compose import compose
from kvcompile.models.sharing import shared
from kvcompile.stores.host import Host

SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
SMALL = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
READ = 2048
STACKS = {
    "dense": [],
    "dense, offload": ["policy=offload"],
    "clusterkv": ["policy=clusterkv"],
    "clusterkv, offload": ["policy=[clusterkv,offload]"],
    "quest": ["policy=quest"],
    "quest, offload": ["policy=[quest,offload]"],
}
WITHIN = 2e-2  # of the largest logit, in float16


def model_of(args: argparse.Namespace) -> Any:
    """A model with random weights."""
    torch.manual_seed(0)
    shape = SMALL if args.gate else SHAPE
    longest = max(args.tokens) + 64
    config = LlamaConfig(**shape, num_hidden_layers=args.layers, vocab_size=32064, max_position_embeddings=longest)
    return LlamaForCausalLM(config).eval().to(args.device, torch.float16)


def stack_of(model: Any, label: str, read: int, chunk: int, kernels: str = "auto") -> Any:
    """The model of a stack over the same weights, whose layers all recall."""
    overrides, policy = STACKS[label], label.partition(",")[0]
    if policy != "dense":
        overrides = [*overrides, f"stack.{policy}.budget={read}", f"stack.{policy}.skip_layers=[]"]
    config = compose([*overrides, f"prefill_chunk={chunk}"])
    plan = plan_of(model.config, "float16", config, config.policies())
    return compile_plan(shared(model), replace(plan, prefill_chunk=chunk), kernels)


def decoded(model: Any, ids: Tensor, steps: int) -> Tensor:
    """Logits `[steps, vocabulary]` of the last tokens of `ids [1, n]`, each a step."""
    cache = model(ids[:, :-steps], logits_to_keep=1).past_key_values
    tokens = torch.split(ids[:, -steps:], 1, dim=1)
    return torch.cat([model(token, past_key_values=cache).logits[0] for token in tokens])


def gate(model: Any) -> None:
    """Exits where a stack is wrong."""
    ids = torch.randint(0, 32064, (1, 404), device=model.device, dtype=torch.int64)
    few: dict[str, Tensor] = {}
    for label in STACKS:
        every, exact = (
            decoded(stack_of(model, label, 1000, 0, how), ids, 4).double() for how in ("triton", "reference")
        )
        wrong = float((every - exact).abs().max() / exact.abs().max())
        if not wrong < WITHIN:
            sys.exit(f"{label} is off by {wrong:.1e}: nothing is timed")
        few[label] = decoded(stack_of(model, label, 64, 0, "triton"), ids, 4)
        if not torch.equal(few[label], few[label.partition(",")[0]]):
            sys.exit(f"{label} is not what it is on the device: nothing is timed")
        print(f"{label}: off by {wrong:.1e}", file=sys.stderr, flush=True)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of every tensor that comes from host memory meanwhile."""
    moved: list[int] = []
    near = Host.near

    def counting(self: Host, x: Tensor) -> Tensor:
        moved.append(x.numel() * x.element_size())
        return near(self, x)

    Host.near = counting  # type: ignore[method-assign]
    try:
        yield moved
    finally:
        Host.near = near  # type: ignore[method-assign]


def bytes_of(model: Any, cache: Any, token: Tensor) -> dict[str, float]:
    """MB held, read by a step, and moved by it."""
    cache.reads = {}
    with counted() as moved:
        model(token, past_key_values=cache)
    read, cache.reads = sum(cache.reads.values()), None
    host = sum(layer.host_bytes_held() for layer in cache.layers)
    sizes = {"device": cache.nbytes() + cache.index_bytes() - host, "host": host, "read": read, "moved": sum(moved)}
    return {f"{name} MB": round(size / 1e6, 1) for name, size in sizes.items()}


def race(contestants: dict[str, tuple[Any, Any]], token: Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step of each by round, in each round in another order; its first step does not count."""
    taken: dict[str, list[float]] = {label: [] for label in contestants}
    order = Random(0)
    for _ in range(rounds):
        for label, (model, cache) in order.sample(list(contestants.items()), len(contestants)):
            steps = []
            for _ in range(4):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                model(token, past_key_values=cache)
                end.record()
                torch.cuda.synchronize()
                steps.append(begin.elapsed_time(end))
            taken[label].append(median(steps[1:]))
    return taken


def measure(model: Any, tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one length."""
    ids = torch.randint(0, 32064, (1, tokens), device=model.device, dtype=torch.int64)
    contestants = {}
    for label in STACKS:
        stack = stack_of(model, label, READ, 4096, args.kernels)
        contestants[label] = stack, stack(ids, logits_to_keep=1).past_key_values
    token = ids[:, :1]
    race(contestants, token, 1)
    taken = race(contestants, token, args.rounds)
    rows = []
    for label, (stack, cache) in contestants.items():
        ratio = median(a / b for a, b in zip(taken["dense"], taken[label], strict=True))
        rows.append(
            {"tokens": tokens, "stack": label, "ms": round(median(taken[label]), 3), "faster": round(ratio, 2)}
            | bytes_of(stack, cache, token)
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


@torch.inference_mode()
def main() -> None:
    """Check, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gate", action="store_true", help="check small shapes, time nothing")
    parser.add_argument("--kernels", default="triton", help="what is timed; `auto` stays with the library on a GPU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out")
    args = parser.parse_args()
    model = model_of(args)
    gate(model)
    if args.gate:
        return
    rows = [row for tokens in args.tokens for row in measure(model, tokens, args)]
    show(args.out, rows, "float16", f"{torch.cuda.get_device_name()}, a step reads {READ} tokens.")


if __name__ == "__main__":
    main()
