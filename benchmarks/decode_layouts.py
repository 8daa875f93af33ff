"""Decode step by cache layout, without a prefill: caches filled with random keys, all models in turns in one process.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode_layouts.py --out benchmarks/results/decode_layouts

Rows: dense transformers; dense through our cache; 20 % kept, all rows alike (dense layout: zigzag, snapkv by layer);
20 % kept in all with heads at 10, 20 and 30 % (ragged layout: adakv and other per-head budgets).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import DynamicCache

from kvcompile.adapters.registry import describe
from kvcompile.calibrator import shared
from kvcompile.compiler import build
from kvcompile.config import ModelConfig
from kvcompile.models import load

SHARES = {"dense": (1.0, 1.0, 1.0), "20 %, rows alike": (0.2, 0.2, 0.2), "20 %, ragged rows": (0.1, 0.2, 0.3)}


def filled(model: Any, cache: Any, tokens: int, batch: int, shares: tuple[float, ...] | None) -> Any:
    """The cache after `tokens` random tokens, cut to a share of them per KV head (None: transformers' own cache)."""
    config = model.config
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    for index in range(config.num_hidden_layers):
        keys, values = torch.randn(shape), torch.randn(shape)
        if shares is None:
            cache.update(keys, values, index)
            continue
        layer = cache.layers[index]
        layer.append(keys, values, torch.arange(tokens).expand(batch, -1), None, 0)
        layer.keep([torch.arange(int(s * tokens)) for _ in range(batch) for s in shares], 64)
    if shares is not None:
        cache.seen = [tokens] * batch
    return cache


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out")
    args = parser.parse_args()
    model, _ = load(ModelConfig())
    ours = build(shared(model), describe(model.config))
    rows = []
    for batch in args.batches:
        for context in args.contexts:
            caches = {"transformers": (model, filled(model, DynamicCache(config=model.config), context, batch, None))}
            for name, shares in SHARES.items():
                caches[name] = (ours, filled(model, ours.new_cache(), context, batch, shares))
            taken: dict[str, list[float]] = {name: [] for name in caches}
            for _ in range(args.steps):
                for name, (runner, cache) in caches.items():
                    start = time.perf_counter()
                    with torch.inference_mode():
                        runner(torch.full((batch, 1), 5), past_key_values=cache, use_cache=True)
                    taken[name].append(time.perf_counter() - start)
            base = statistics.median(taken["transformers"][2:])
            for name, times in taken.items():
                step = statistics.median(times[2:])
                row = {"batch": batch, "context": context, "cache": name, "ms": round(1000 * step, 1)}
                rows.append({**row, "min ms": round(1000 * min(times), 1), "faster": round(base / step, 2)})
    text = tabulate(rows, headers="keys", tablefmt="github")
    print(text)
    if args.out:
        head = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads"
        command = f"    OMP_WAIT_POLICY=PASSIVE python {' '.join(sys.argv)}"
        Path(args.out + ".md").write_text(f"{head}, torch {torch.__version__}\n\n{command}\n\n{text}\n")


if __name__ == "__main__":
    main()
