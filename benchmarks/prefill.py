"""What compressing adds to a prefill of the default model.

    python benchmarks/prefill.py --contexts 1024 2048 4096 --rounds 5 --out benchmarks/results/prefill

fastest s: the fastest whole prefill (models in turns, each round beginning with another one; other work on a machine
only ever adds time). overhead %: that over the fastest of dense transformers, less one.
selection %: time of the graph's nodes that only a compressed model has (observe, compress, allocate, trim, flush)
over the time of all others, in the same pass: noise on the machine hits both alike. Median of the rounds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from tabulate import tabulate
from whole_model import models

from kvcompile.calibration.text import sentences
from kvcompile.config.schema import ModelConfig
from kvcompile.evaluation.speed import forward
from kvcompile.graph import ops
from kvcompile.models.loading import load

SELECTING = (ops.observe, ops.compress, ops.allocate, ops.trim, ops.flush)


class Timed(fx.Interpreter):
    """Runs a graph and keeps the seconds of some of its nodes (True) and of its others (False)."""

    def __init__(self, module: fx.GraphModule, targets: tuple[Any, ...], clock: Callable[[], float]) -> None:
        super().__init__(module)
        self.targets, self.clock = targets, clock
        self.spent: Counter[bool] = Counter()

    def run_node(self, n: fx.Node) -> Any:
        start = self.clock()
        found = super().run_node(n)
        self.spent[n.target in self.targets] += self.clock() - start
        return found


def share(
    model: Any,
    ids: torch.Tensor,
    targets: tuple[Any, ...] = SELECTING,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of some nodes over those of all others, in one prefill."""
    graph = model.kvcompile.graph
    timed = Timed(graph, targets, clock)
    model.kvcompile.graph = timed.run
    try:
        forward(model, ids)
    finally:
        model.kvcompile.graph = graph
    return timed.spent[True] / timed.spent[False]


@torch.inference_mode()
def rows(compared: dict[str, Any], ids: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """One table row per model; the first one is the baseline."""
    taken: dict[str, list[float]] = {name: [] for name in compared}
    shares: dict[str, list[float]] = {name: [] for name in compared}
    for model in compared.values():
        forward(model, ids)
    order = list(compared)
    for _ in range(rounds):
        for name in order:
            start = time.perf_counter()
            forward(compared[name], ids)
            taken[name].append(time.perf_counter() - start)
            if hasattr(compared[name], "kvcompile"):
                shares[name].append(share(compared[name], ids))
        order = [*order[1:], order[0]]
    base = min(next(iter(taken.values())))
    return [
        {
            "model": name,
            "fastest s": round(min(mine), 3),
            "overhead %": round(100 * (min(mine) / base - 1), 1),
            "selection %": round(100 * statistics.median(shares[name]), 1) if shares[name] else None,
        }
        for name, mine in taken.items()
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", default="benchmarks/stacks/prefill.txt")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    model, tokenizer = load(ModelConfig())
    compared = models(args.stacks, model, tokenizer)
    text = tokenizer(" ".join(sentences()), return_tensors="pt")["input_ids"]
    parts = [f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"]
    parts.append(f"    python {' '.join(sys.argv)}")
    for tokens in args.contexts:
        table = tabulate(rows(compared, text[:, :tokens], args.rounds), headers="keys", tablefmt="github")
        parts.append(f"### context {tokens}\n\n{table}")
        print(parts[-1], flush=True)
    if args.out:
        Path(args.out + ".md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
