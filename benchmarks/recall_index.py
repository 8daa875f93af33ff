"""What putting tokens into groups adds to a prefill of the default model, and how many rounds of k-means are worth it.

    OMP_NUM_THREADS=1 python benchmarks/recall_index.py --contexts 4096 8000 --out benchmarks/results/recall_index

index %: processor time of the graph's `index` nodes over that of all its others, in the same prefill; on one thread, as
threads that wait count too. Median and most of the rounds. Then, for one context, k-means with other numbers of
rounds, on the same keys: processor time of indexing all layers, the mean of 1 - cos of a key and its mean, and cluster
recall of the next `--steps` tokens.
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
from prefill import share
from tabulate import tabulate

from kvcompile.build import plan_of
from kvcompile.calibration.text import sentences
from kvcompile.compiler import compile_plan
from kvcompile.config.compose import compose
from kvcompile.config.schema import ModelConfig
from kvcompile.evaluation.recall import decoded_recall
from kvcompile.evaluation.speed import forward
from kvcompile.graph import ops
from kvcompile.models.loading import load
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import Plan
from kvcompile.recall import kmeans
from kvcompile.runtime.cache import KVCache, Step

TRIED = (0, 1, 2, 4)  # rounds


def compiled(model: Any, overrides: list[str]) -> Any:
    """The default model with a stack."""
    config = compose(overrides)
    return compile_plan(shared(model), plan_of(model.config, "float32", config, tuple(config.policies())))


@torch.inference_mode()
def shares(models: dict[str, Any], ids: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """One table row a model."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            found[name].append(100 * share(model, ids, (ops.index,), time.process_time))
    return [
        {"recipe": name, "index %": round(statistics.median(x), 1), "most %": round(max(x), 1)}
        for name, x in found.items()
    ]


@torch.inference_mode()
def tried(model: Any, ids: torch.Tensor, steps: int) -> list[dict[str, Any]]:
    """One table row for each way to run k-means, on the keys of one prefill."""
    _, cache = forward(model, ids[:, :-steps])
    usual, rows = kmeans.ROUNDS, []
    for rounds in TRIED:
        kmeans.ROUNDS = rounds
        branch, spent = regrouped(cache, model.kvcompile.plan)
        far = statistics.mean(farness(layer) for layer in branch.layers if layer.index is not None)
        recalls = decoded_recall(model, branch, ids[:, -steps:])
        rows.append(
            {"rounds": rounds, "index cpu s": round(spent, 2)}
            | {"1 - cos": round(far, 4), "cluster recall": round(statistics.mean(recalls.values()), 3)}
        )
        print(rows[-1], file=sys.stderr, flush=True)
    kmeans.ROUNDS = usual
    return rows


def regrouped(cache: KVCache, plan: Plan) -> tuple[KVCache, float]:
    """A copy of a cache as a plan with another recall would have left it, and the processor time of grouping."""
    branch, spent = cache.fork(), 0.0
    branch.plan = plan
    step = Step(branch, torch.tensor([cache.seen]), None, prefill=True, last=True)
    for layer, p in zip(branch.layers, plan.layers, strict=True):
        layer.ungroup()
        layer.plan = p
        start = time.process_time()
        layer.group_new(step)
        spent += time.process_time() - start
    return branch, spent


def farness(layer: Any) -> float:
    """Mean 1 - cos of the keys of a layer's groups and the mean that stands for them."""
    table, first, total = layer.index.table, layer.index.first, []
    for r, (keys, _, _) in enumerate(layer.held.rows()):
        own = table.representatives[r].repeat_interleave(table.sizes[r], dim=0)
        total.append(1 - torch.cosine_similarity(keys[first : first + own.shape[0]], own, dim=-1).mean())
    return float(torch.stack(total).mean())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["clusterkv"])
    parser.add_argument("--contexts", type=int, nargs="*", default=[4096, 8000])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tried", type=int, default=4096, help="context of the table of k-means (0: none)")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out")
    args = parser.parse_args()
    model, tokenizer = load(ModelConfig())
    models = {name: compiled(model, [f"recipe={name}"]) for name in args.recipes}
    text = tokenizer(" ".join(sentences()), return_tensors="pt")["input_ids"]
    parts = [f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"]
    parts.append(f"    python {' '.join(sys.argv)}")
    for tokens in args.contexts:
        table = tabulate(shares(models, text[:, :tokens], args.rounds), headers="keys", tablefmt="github")
        parts.append(f"### context {tokens}\n\n{table}")
        print(parts[-1], flush=True)
    if args.tried and "clusterkv" in models:
        rows = tried(models["clusterkv"], text[:, : args.tried + args.steps], args.steps)
        parts.append(f"### k-means, context {args.tried}\n\n{tabulate(rows, headers='keys', tablefmt='github')}")
        print(parts[-1], flush=True)
    if args.out:
        Path(args.out + ".md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
