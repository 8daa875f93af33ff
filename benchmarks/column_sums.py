"""Scores that are sums of attention (h2o, tova): added up by the attention kernel, or computed once more, in turns.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/column_sums.py --out benchmarks/results/column_sums

One model of the cache folder, one process, one backend (cpp). kernel: its pass adds up what entries receive. again: the
same model, where the score looks at queries and keys itself. plain: the same, with nothing selected while decoding.
Prefill in seconds, decoding in milliseconds a token (mean over `--tokens`, evictions and looks included), medians over
`--rounds`. Nothing is printed unless both ways keep the same entries in every round.
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
from torch import Tensor

from kvcompile.calibration.text import sentences
from kvcompile.compiler import assemble
from kvcompile.config.schema import Config, ModelConfig
from kvcompile.config.validate import finish
from kvcompile.models.loading import load
from kvcompile.models.sharing import shared
from kvcompile.runtime.cache import KVCache

POLICIES = {"h2o": 16, "tova": 1}  # decoded tokens between two selections
WAYS = ("kernel", "again", "plain")


def cache_of(model: Any, way: str) -> KVCache:
    """A new cache; for `again` its kernels claim to compute no sums."""
    cache: KVCache = model.new_cache()
    if way == "again":
        cache.kernels.scores = lambda *_: False  # type: ignore[method-assign]
    return cache


def timed(model: Any, way: str, ids: Tensor, prompt: int) -> tuple[float, float, KVCache]:
    """Seconds of the prefill and of one decoded token; the cache they leave."""
    cache, start = cache_of(model, way), time.perf_counter()
    model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
    middle = time.perf_counter()
    for t in range(prompt, ids.shape[1]):
        model(ids[:, t : t + 1], past_key_values=cache)
    return middle - start, (time.perf_counter() - middle) / (ids.shape[1] - prompt), cache


def differing(mine: KVCache, theirs: KVCache) -> float:
    """Share of the entries that only one of two caches holds."""
    lost = total = 0
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        for (*_, at), (*_, other) in zip(a.held.rows(), b.held.rows(), strict=True):
            total += len(at)
            lost += len(set(at.tolist()) - set(other.tolist()))
    return lost / total


def measure(
    model: Any, plain: Any, ids: Tensor, prompt: int, rounds: int
) -> tuple[dict[str, tuple[float, float]], float]:
    """Medians by way, and the largest difference between what the two ways keep."""
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    order, worst = list(WAYS), 0.0
    for turn in range(rounds + 1):
        caches = {}
        for way in order:
            prefill, decode, caches[way] = timed(plain if way == "plain" else model, way, ids, prompt)
            if turn:  # the first round compiles
                taken[way].append((prefill, decode))
        worst = max(worst, differing(caches["kernel"], caches["again"]))
        order = [*order[1:], order[0]]
    return {way: tuple(map(statistics.median, zip(*times, strict=True))) for way, times in taken.items()}, worst  # type: ignore[misc]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.9])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write <out>.md")
    given = parser.parse_args()
    original, tokenizer = load(ModelConfig(name=given.model), lambda *_: None)
    text = torch.as_tensor(tokenizer(" ".join(sentences()), return_tensors="pt")["input_ids"])
    rows = []
    with torch.inference_mode():
        for policy, every in POLICIES.items():
            for budget in given.budgets:
                fields = {"budget": budget, "decode_every": every}
                model, plain = (
                    assemble(shared(original), finish(Config(stack={policy: f}, kernels="cpp")))
                    for f in (fields, {**fields, "decode_every": 0})
                )
                for context in given.contexts:
                    ids = text[:, : context + given.tokens]
                    times, worst = measure(model, plain, ids, context, given.rounds)
                    if worst > 1e-3:
                        sys.exit(f"{policy} {budget:g} at {context}: {worst:.2%} of what is kept differs")
                    prefill = [times[way][0] for way in WAYS]
                    decode = [1e3 * times[way][1] for way in WAYS]
                    rows.append(
                        (policy, budget, context, *prefill, *decode, decode[0] / decode[2], decode[1] / decode[2])
                    )
                    print(rows[-1], f"differs {worst:.2e}", file=sys.stderr, flush=True)
    header = ["policy", "budget", "context", *(f"prefill s, {w}" for w in WAYS), *(f"ms/token, {w}" for w in WAYS)]
    table = tabulate(rows, [*header, "kernel / plain", "again / plain"], tablefmt="pipe", floatfmt=".3g")
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    said = f"{time.strftime('%Y-%m-%d')}, {where}\n\n    python {' '.join(sys.argv)}\n\n{table}\n"
    print(said)
    if given.out:
        given.out.with_suffix(".md").write_text(f"# Column sums in the attention kernel\n\n{said}", "utf-8")


if __name__ == "__main__":
    main()
