"""Decode of whole models that read a part of what they keep, beside dense ones, in turns.

    OMP_NUM_THREADS=1 python benchmarks/recall_model.py --out benchmarks/results/recall_model

`smollm2`: the default model, 8,000 tokens. `llama`: four layers of the shape of a model of 1B (32 heads over 8 of 64
channels, a quarter of its vocabulary, random weights), 32,768 tokens, every layer recalls. Caches are filled with
normal numbers, not by a prompt: a step takes as long over these. ms: median step; faster: median ratio to dense in our
cache, round by round. MB: keys and values held, what stands for groups, and what a step reads of both.

With one thread times are CPU times, for a machine on which something else runs too. Nothing is printed unless dense
decodes what transformers does, and each stack that is told to read everything decodes what dense does.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from random import Random
from statistics import median
from typing import Any

import torch
from tables import show
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvcompile.adapters.architectures import describe
from kvcompile.build import plan_of
from kvcompile.compiler import compile_plan
from kvcompile.config.compose import compose
from kvcompile.config.schema import ModelConfig
from kvcompile.models.loading import load
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import Plan
from kvcompile.plan.selection import Budget
from kvcompile.runtime.cache import KVCache, Step

STACKS = {
    "quest, 2k read": ["policy=quest", "stack.quest.budget=2048"],
    "clusterkv, 2k read": ["policy=clusterkv", "stack.clusterkv.budget=2048"],
    "clusterkv, 1k read": ["policy=clusterkv", "stack.clusterkv.budget=1024"],
}
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
TOKENS = {"smollm2": 8000, "llama": 32768}
WITHIN = 2e-3  # of the largest logit


def model_of(name: str) -> tuple[Any, list[str]]:
    """A model in float32, and options of its stacks."""
    if name == "smollm2":
        return load(ModelConfig())[0], []
    config = LlamaConfig(**SHAPE, num_hidden_layers=4, vocab_size=32064, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval(), ["skip_layers=[]"]


def numbers(plan: Plan, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, the same for every contestant."""
    made, p = torch.Generator().manual_seed(layer), plan.layers[layer]
    keys, values = torch.randn(2, 1, p.kv_heads, tokens, p.head_dim, generator=made)
    return keys, values


def filled(model: Any, tokens: int) -> KVCache:
    """A cache of so many tokens, grouped as at the end of a prompt."""
    cache: KVCache = model.new_cache()
    positions = torch.arange(tokens).unsqueeze(0)
    cache.seen = [tokens]
    step = Step(cache, positions, None, prefill=True, last=True)
    for p, layer in zip(cache.plan.layers, cache.layers, strict=True):
        layer.append(*numbers(cache.plan, p.index, tokens), positions, None, cache.headroom)
        layer.group_new(step)
    return cache


def foreign(plan: Plan, tokens: int) -> DynamicCache:
    """The same in transformers' own cache."""
    cache = DynamicCache()
    for p in plan.layers:
        cache.update(*numbers(plan, p.index, tokens), p.index)
    return cache


def reading(cache: KVCache, budget: float | None) -> list[Any]:
    """Make every layer that recalls read so many tokens; what they were told before."""
    groups = [layer.index for layer in cache.layers if layer.index is not None]
    before = [index.recall for index in groups]
    for index in groups:
        index.recall = replace(index.recall, budget=Budget(budget))
    return list(zip(groups, before, strict=True))


Contestants = dict[str, tuple[Any, Any]]  # model and cache


@torch.inference_mode()
def agree(contestants: Contestants, tokens: int) -> None:
    """Exits where a contestant that reads everything decodes something else."""
    token, logits = torch.tensor([[5]]), {}
    for name, (model, cache) in contestants.items():
        told = reading(cache, 2 * tokens) if isinstance(cache, KVCache) else []
        logits[name] = model(token, past_key_values=cache).logits[0, -1]
        for index, recall in told:
            index.recall = recall
    for name, found in logits.items():
        wrong = float((found - logits["dense"]).abs().max() / logits["dense"].abs().max())
        if not wrong < WITHIN:
            sys.exit(f"{name} is off by {wrong:.1e}: nothing was timed")


@torch.inference_mode()
def race(contestants: Contestants, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each, by round; in each round another order, and the first step of a turn does not count."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    order = Random(0)
    for _ in range(rounds):
        for name, (model, cache) in order.sample(list(contestants.items()), len(contestants)):
            steps = []
            for _ in range(4):
                begin = clock()
                model(torch.tensor([[7]]), past_key_values=cache)
                steps.append(clock() - begin)
            taken[name].append(median(steps[1:]))
    return taken


@torch.inference_mode()
def bytes_of(model: Any, cache: Any) -> tuple[int, int, int]:
    """Keys and values held, what stands for groups, and what a step reads."""
    if not isinstance(cache, KVCache):
        size = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        return size, 0, size
    cache.reads = {}
    model(torch.tensor([[7]]), past_key_values=cache)
    read, cache.reads = sum(cache.reads.values()), None
    return cache.nbytes(), cache.index_bytes(), read


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one model."""
    model, options = model_of(name)
    tokens, dense = TOKENS[name], describe(model.config)
    ours = compile_plan(shared(model), dense)
    contestants: Contestants = {"transformers": (model, foreign(dense, tokens)), "dense": (ours, filled(ours, tokens))}
    for label, overrides in STACKS.items():
        policy = overrides[0].removeprefix("policy=")
        config = compose([*overrides, *(f"stack.{policy}.{option}" for option in options)])
        stack = compile_plan(shared(model), plan_of(model.config, "float32", config, config.policies()))
        contestants[label] = stack, filled(stack, tokens)
    agree(contestants, tokens)
    race(contestants, 1)
    taken = race(contestants, rounds)
    rows = []
    for label, contestant in contestants.items():
        held, index, read = bytes_of(*contestant)
        ratio = median(a / b for a, b in zip(taken["dense"], taken[label], strict=True))
        sizes = {"held MB": held, "index MB": index, "read MB": read}
        rows.append(
            {"model": name, "tokens": tokens, "stack": label, "ms": round(1000 * median(taken[label]), 1)}
            | {"faster": round(ratio, 2)}
            | {what: round(size / 1e6, 1) for what, size in sizes.items()}
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Check, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(TOKENS), choices=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [row for name in args.models for row in measure(name, args.rounds)]
    show(args.out, rows, "float32")


if __name__ == "__main__":
    main()
