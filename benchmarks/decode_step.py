"""A decode step beside what memory allows: bytes of weights and of cache read, over the measured speed of reading.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode_step.py --lengths 1024 4096 8192 --batches 1 8 --out ...
    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode_step.py --recipes zigzag --weights int8 int4 --models "" FILE.gguf
    python benchmarks/decode_step.py --dtypes bfloat16 --weights int4 --llama PYTHON --gguf FILE.gguf
    OMP_NUM_THREADS=1 python benchmarks/decode_step.py --profile

Caches of random keys and values. Rows: transformers, ours through the modules of the layers (as before there were
fused kernels), ours fused, with `--weights int8 int4` ours fused over weights in few bits, and with `--recipes zigzag`
ours fused over a cache that keeps `--keep` of the rows on average, by lengths drawn at random; steps in turns, in one
process. `roof ms` is the time in which this machine reads the bytes of weights and cache once, by the best of many
readings of a large array between the steps; `/ roof` is the median step over it, and `x` are medians over the rounds of
the first row's step over this one's, which other work on the machine changes least.
`--llama PYTHON` adds llama.cpp, of batch 1, over its own GGUF file of each model (`--gguf`): steps by themselves, in
the same run (`peer_llama.py`), with a cache in 16 bits.
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
from peers import WORKERS, foreign
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


def thinned(cache: Any, length: int, share: float) -> Any:
    """The same cache with a random part of each row, `share` of it on average and at most twice that."""
    drawn = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        if layer.store is not None:
            rows = len(layer.store.lengths)
            counts = (2 * share * length * torch.rand(rows, generator=drawn)).long().clamp(1, length).tolist()
            order = [torch.randperm(length, generator=drawn)[:n].sort().values for n in counts]
            layer.keep(order, cache.headroom)
    return cache


def contestants(
    original: Any, compiled: Any, others: dict[str, Any], batch: int, length: int, share: float
) -> tuple[dict[str, Step], dict[str, int]]:
    """One decode step of each way to run the model, over a cache of its own; bytes of the caches."""
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
    held = dict.fromkeys(runs, own.nbytes())
    for label, model in others.items():
        cache = filled(model.new_cache(), plan, batch, length, dtype)
        if model.kvcompile.plan.selected:
            thinned(cache, length, share)
        runs[label], held[label] = partial(model, token, past_key_values=cache), cache.nbytes()
    return runs, held


def bytes_read(model: Any) -> int:
    """Weights that a step of a contestant reads: all of them, but of a head with its own copy not the embeddings."""
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


def other_models(original: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Compiled models by label: weights in few bits, recipes, and each recipe over each of these weights."""
    made: dict[str, Any] = {}
    for recipe in ("", *args.recipes):
        for format in ("", *args.weights):
            if not (recipe or format):
                continue
            over = [f"model.weights={format}"] * bool(format) + [f"budget={args.keep}"] * bool(recipe)
            name = ", ".join(filter(None, ("fused", format, f"{recipe} {args.keep:.0%}" * bool(recipe))))
            made[name] = kvcompile.compile(shared(original), **({"recipe": recipe} if recipe else {}), overrides=over)
    return made


def llama(args: argparse.Namespace, gguf: str, config: Any) -> dict[int, dict[str, Any]]:
    """By length, llama.cpp's row: its median step over random tokens."""
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    drawn = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1000, 30000, (n,), generator=drawn, dtype=torch.int64).tolist() for n in args.lengths]
    job = {"gguf": gguf, "prompts": prompts, "tokens": 2 * args.rounds, "threads": torch.get_num_threads()}
    timed = foreign(args.llama, WORKERS["llama"], {**job, "kv_elements": elements})["timed"]
    return {n: {**next(iter(timed[str(n)].values())), "weights": Path(gguf).stat().st_size} for n in args.lengths}


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[""], help="paths; '' is the default model")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--weights", nargs="*", default=[], help="int8, int4")
    parser.add_argument("--recipes", nargs="*", default=[], help="that select: zigzag; with all of --weights too")
    parser.add_argument("--keep", type=float, default=0.2, help="share of the tokens that --recipes keep")
    parser.add_argument("--llama", help="python of an environment with llama-cpp-python")
    parser.add_argument("--gguf", nargs="+", default=[], help="for it, the file of each of --models")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    reader = Reader()
    theirs: dict[int, dict[str, Any]] = {}
    for path, name in ((path, name) for path in args.models for name in args.dtypes):
        original, _ = load(ModelConfig(**({"pretrained": path} if path else {}), dtype=name))
        compiled, others = kvcompile.compile(shared(original)), other_models(original, args)
        if args.llama:
            theirs = llama(args, args.gguf[args.models.index(path)], original.config)
        for batch, length in ((b, n) for b in args.batches for n in args.lengths):
            with torch.inference_mode():
                runs, held = contestants(original, compiled, others, batch, length, args.keep)
                about = {"model": Path(path).stem or "SmolLM2-135M", "dtype": name, "batch": batch, "tokens": length}
                if args.profile:
                    rows += [{**about, **row} for row in profile(runs)]
                    continue
                taken = race(runs, args.rounds, reader)
            base = taken["transformers"]
            for label, mine in taken.items():
                roof = (bytes_read(others.get(label, original)) + held[label]) / reader.rate
                median = statistics.median(mine)
                ratio = statistics.median(b / m for b, m in zip(base, mine, strict=True))
                step = {"step ms": round(1e3 * median, 1), "best ms": round(1e3 * min(mine), 1)}
                rows.append(
                    {**about, "": label, **step, "roof ms": round(1e3 * roof, 1), "/ roof": round(median / roof, 2)}
                    | {"x": round(ratio, 2)}
                )
            if theirs and batch == 1:
                step, held_there = theirs[length]["decode ms"], 1e6 * theirs[length]["cache MB"]
                roof = 1e3 * (theirs[length]["weights"] + held_there) / reader.rate
                row = {**about, "": "llama.cpp", "step ms": round(step, 1), "roof ms": round(roof, 1)}
                rows.append(
                    {**row, "/ roof": round(step / roof, 2), "x": round(1e3 * statistics.median(base) / step, 2)}
                )
    show(args.out, rows, note="" if args.profile else f"read {reader.rate / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
