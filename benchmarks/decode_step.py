"""A decode step beside what memory allows: bytes of weights and of cache read, over the measured speed of reading.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode_step.py --lengths 1024 4096 8192 --batches 1 8 --out ...
    OMP_NUM_THREADS=1 python benchmarks/decode_step.py --profile

Dense caches of random keys and values. Rows: transformers, ours through the modules of the layers (as before there were
fused kernels), ours fused, and with `--weights int8 int4` ours fused over weights in few bits; steps in turns, in one
process. `roof ms` is the time in which this machine reads the bytes
once, by the best of many readings of a large array between the steps; `/ roof` is the median step over it, and `x` are
medians over the rounds of the first row's step over this one's, which other work on the machine changes least.
`--profile` counts calls of Python functions, and of ATen operators, in one step.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode_linear import Reader, seconds
from tables import show
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import kvcompile
from kvcompile.config.schema import ModelConfig
from kvcompile.models.loading import load
from kvcompile.models.sharing import shared
from kvcompile.structure.pack import weight_bytes

Step = Callable[[], Any]


class Operators(TorchDispatchMode):
    """Counts ATen operators."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def filled(cache: Any, plan: Any, batch: int, length: int, dtype: torch.dtype) -> Any:
    """The cache with so many random tokens of each sequence."""
    positions = torch.arange(length, dtype=torch.int64).expand(batch, length)
    for p in plan.layers:
        keys, values = torch.randn(2, batch, p.kv_heads, length, p.head_dim).to(dtype)
        if isinstance(cache, DynamicCache):
            cache.update(keys, values, p.index)
        else:
            cache.layers[p.index].append(keys, values, positions, None, cache.headroom)
            cache.seen = [length] * batch
    return cache


def contestants(original: Any, compiled: Any, rounded: dict[str, Any], batch: int, length: int) -> dict[str, Step]:
    """One decode step of each way to run the model, over a cache of its own."""
    plan, dtype, token = compiled.kvcompile.plan, compiled.dtype, torch.full((batch, 1), 42)
    caches = [DynamicCache(), compiled.new_cache(), compiled.new_cache()]
    theirs, plain, own = (filled(cache, plan, batch, length, dtype) for cache in caches)
    steps = compiled.kvcompile.steps

    def ours(cache: Any, how: Any) -> Any:
        compiled.kvcompile.steps = how
        return compiled(token, past_key_values=cache)

    runs: dict[str, Step] = {
        "transformers": lambda: original(token, past_key_values=theirs, use_cache=True),
        "modules": lambda: ours(plain, None),
        "fused": lambda: ours(own, steps),
    }
    for format, model in rounded.items():
        cache = filled(model.new_cache(), plan, batch, length, dtype)
        runs[f"fused, {format}"] = partial(model, token, past_key_values=cache)
    return runs


def bytes_read(original: Any, rounded: dict[str, Any], label: str) -> int:
    """Weights that a step of a contestant reads: all of them, but of a head with its own copy not the embeddings."""
    model = rounded.get(label.removeprefix("fused, "), original)
    embeddings, head = (x().weight for x in (model.get_input_embeddings, model.get_output_embeddings))
    unread = 0 if head is embeddings else embeddings.numel() * embeddings.element_size()
    return weight_bytes(model) - unread


def race(runs: dict[str, Step], rounds: int, reader: Reader) -> dict[str, list[float]]:
    """Seconds of each round's step, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 2):  # the first two warm up
        reader.run()
        for name, run in runs.items():
            took = seconds(run)
            if round_ > 1:
                taken[name].append(took)
    return taken


def profile(runs: dict[str, Step]) -> list[dict[str, Any]]:
    """Calls of one step."""
    rows = []
    for name, run in runs.items():
        run()
        with Operators() as operators:
            run()
        profiler = cProfile.Profile()
        profiler.runcall(run)
        rows.append({"": name, "Python calls": pstats.Stats(profiler).total_calls, "ATen calls": operators.count})  # type: ignore[attr-defined]
    return rows


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[""], help="paths; '' is the default model")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--weights", nargs="*", default=[], help="int8, int4")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    reader = Reader()
    for path, name in ((path, name) for path in args.models for name in args.dtypes):
        original, _ = load(ModelConfig(**({"pretrained": path} if path else {}), dtype=name))
        compiled = kvcompile.compile(shared(original))
        rounded = {
            each: kvcompile.compile(shared(original), overrides=[f"model.weights={each}"]) for each in args.weights
        }
        for batch, length in ((b, n) for b in args.batches for n in args.lengths):
            with torch.inference_mode():
                runs = contestants(original, compiled, rounded, batch, length)
                about = {"model": Path(path).stem or "SmolLM2-135M", "dtype": name, "batch": batch, "tokens": length}
                if args.profile:
                    rows += [{**about, **row} for row in profile(runs)]
                    continue
                taken = race(runs, args.rounds, reader)
            held = sum(layer.bytes for layer in compiled.kvcompile.plan.bytes(batch, length))
            base = taken["transformers"]
            for label, mine in taken.items():
                roof = (bytes_read(original, rounded, label) + held) / reader.rate
                median = statistics.median(mine)
                ratio = statistics.median(b / m for b, m in zip(base, mine, strict=True))
                step = {"step ms": round(1e3 * median, 1), "best ms": round(1e3 * min(mine), 1)}
                rows.append(
                    {**about, "": label, **step, "roof ms": round(1e3 * roof, 1), "/ roof": round(median / roof, 2)}
                    | {"x": round(ratio, 2)}
                )
    show(args.out, rows, note="" if args.profile else f"read {reader.rate / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
