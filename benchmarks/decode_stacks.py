"""Decode steps over real caches: one dense prefill a context, each stack applied to a copy of it, steps in turns.

    python benchmarks/decode_stacks.py --contexts 1024 4096 8000 --batches 1 4 --out benchmarks/results/decode_stacks

Rows: dense transformers, dense through our cache, every stack of the file (`label: recipe and overrides`). A step's
time does not depend on how the cache came to be, so the prompt is paid for once. Ratios are medians over the rounds of
(transformers' median step / the row's median step). Batches repeat one sequence. Run it on a machine that does nothing
else, with the OpenMP defaults (its threads then spin between small operations).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from needle_sweep import plans, stacks
from tabulate import tabulate
from transformers import DynamicCache

from kvcompile.analysis.compare.branching import Branching
from kvcompile.calibration.probe import ModelCalibrator
from kvcompile.calibration.text import sentences
from kvcompile.compiler import compile_plan
from kvcompile.config.schema import ModelConfig
from kvcompile.evaluation.speed import cache_bytes
from kvcompile.models.loading import load
from kvcompile.models.sharing import shared


def transformers_cache(dense: Any) -> DynamicCache:
    """The same keys and values in transformers' cache."""
    cache = DynamicCache()
    for layer in dense.layers:
        view = layer.held.view()
        cache.update(view.keys.contiguous(), view.values.contiguous(), layer.plan.index)
    return cache


def caches(runs: Branching, all_plans: dict[str, Any], batch: int) -> dict[str, Any]:
    """label -> cache of `batch` equal sequences, as each stack leaves it after the prompt."""
    out = {}
    for label, plan in all_plans.items():
        cache = runs.branch(plan)
        if batch > 1:
            cache = copy.deepcopy(cache)
            cache.batch_repeat_interleave(batch)
        out[label] = cache
    return {"transformers": transformers_cache(out["dense"]), **out}


@torch.inference_mode()
def steps(model: Any, cache: Any, token: torch.Tensor, count: int) -> list[float]:
    """Seconds of `count` decode steps."""
    taken = []
    for _ in range(count):
        at = torch.full((1, 1), cache.get_seq_length())
        begin = time.perf_counter()
        model(token, past_key_values=cache, position_ids=at, use_cache=True)
        taken.append(time.perf_counter() - begin)
    return taken


def race(models: dict[str, Any], held: dict[str, Any], batch: int, count: int, rounds: int) -> list[dict[str, Any]]:
    """One row a model, decode steps in turns."""
    token = torch.full((batch, 1), 42)
    sizes = {label: cache_bytes(cache) for label, cache in held.items()}
    taken: dict[str, list[float]] = {label: [] for label in models}
    fastest = dict.fromkeys(models, float("inf"))
    for round_ in range(rounds + 1):  # the first one warms up
        for label, model in models.items():
            found = steps(model, held[label], token, count)
            if round_:
                taken[label].append(statistics.median(found))
                fastest[label] = min(fastest[label], *found)
    base = taken["transformers"]
    return [
        {
            "row": label,
            "decode ms": round(1000 * statistics.median(mine), 1),
            "min ms": round(1000 * fastest[label], 1),
            "tokens/s": round(batch / statistics.median(mine), 1),
            "x transformers": round(statistics.median(b / m for b, m in zip(base, mine, strict=True)), 2),
            "cache MB": round(sizes[label] / 1e6, 1),
        }
        for label, mine in taken.items()
    ]


def main() -> None:
    """Parse, run, print and write Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", default="benchmarks/stacks/decode.txt")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    model, tokenizer = load(ModelConfig())
    rows = stacks(args.stacks)
    runs = Branching(model)
    all_plans = {"dense": runs.identity, **plans(rows, model, ModelCalibrator(model, tokenizer, lambda *_: None))}
    models = {"transformers": model, **{k: compile_plan(shared(model), plan) for k, plan in all_plans.items()}}
    ids = tokenizer(" ".join(sentences()))["input_ids"]
    text, data = [], []
    for context in args.contexts:
        runs.prefill(ids[:context])
        for batch in args.batches:
            found = race(models, caches(runs, all_plans, batch), batch, args.tokens, args.rounds)
            text.append(
                f"### context {context}, batch {batch}\n\n{tabulate(found, headers='keys', tablefmt='github')}\n"
            )
            print(text[-1], flush=True)
            data.append({"context": context, "batch": batch, "rows": found})
    if args.out:
        backend = models["dense"].new_cache().backend.name
        machine = (
            f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, kernels {backend}"
        )
        listed = "\n".join(f"- {k}: `{' '.join(v)}`" for k, v in rows.items())
        head = f"{time.strftime('%Y-%m-%d')}, {machine}\n\n    python {' '.join(sys.argv)}\n\n{listed}\n"
        Path(args.out + ".md").write_text("\n".join([head, *text]))
        Path(args.out + ".json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
