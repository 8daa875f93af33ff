"""What ghost scores in their linear form (chunk 256, band 8) add to a prefill of the default model.

    OMP_NUM_THREADS=1 python benchmarks/ghost_cost.py --contexts 1024 4096 --out benchmarks/results/ghost_cost

Prefills of one text in turns, dense and of recipe `ghost`. Each column is a share of the dense prefill of its round,
the median over the rounds.
scores %: the scorer alone. observed %: with it the rotation of the queries and what else the graph's node does that
observes a layer. selected %: with it the selection over all layers and heads, and moving what stays. torch scores %:
the scorer in PyTorch in place of the generated one, once. prefill %: whole prefills, less one.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.fx as fx
from prefill import SELECTING
from tables import show

import kvcompile
from kvcompile.calibration.text import sentences
from kvcompile.config.schema import ModelConfig
from kvcompile.graph import ops
from kvcompile.kernels.reference.ghost import Scorer, ghost_scores
from kvcompile.models.loading import load
from kvcompile.models.sharing import shared


@dataclass(frozen=True)
class Spent:
    """Seconds of one prefill, and in it those of the scorer, of the nodes that observe, and of all that select."""

    whole: float
    scores: float = 0.0
    observed: float = 0.0
    selected: float = 0.0


def clock() -> float:
    """Of the one thread that there is, else of the wall."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def prefill(model: Any, ids: torch.Tensor) -> float:
    """Seconds of a whole prefill."""
    cache, begin = model.new_cache(), clock()
    model(ids, past_key_values=cache, logits_to_keep=1)
    return clock() - begin


class Timed(fx.Interpreter):
    """Runs a graph and counts the seconds of its nodes by what they call."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.spent: Counter[Any] = Counter()

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        begin = clock()
        result = super().run_node(n)
        self.spent[n.target] += clock() - begin
        return result


def timed_prefill(model: Any, ids: torch.Tensor, scorer: Scorer | None = None) -> Spent:
    """The same in parts; `scorer` in place of the backend's."""
    cache, graph, scoring = model.new_cache(), model.kvcompile.graph, list[float]()
    cache.backend = replace(cache.backend, ghost=counted(scorer or cache.backend.ghost, scoring))
    timed = Timed(graph)
    model.kvcompile.graph = timed.run
    try:
        begin = clock()
        model(ids, past_key_values=cache, logits_to_keep=1)
        whole = clock() - begin
    finally:
        model.kvcompile.graph = graph
    return Spent(whole, sum(scoring), timed.spent[ops.observe], sum(timed.spent[target] for target in SELECTING))


def counted(scorer: Scorer, seconds: list[float]) -> Callable[..., torch.Tensor]:
    """A scorer that says how long each of its calls took."""

    def score(*given: Any) -> torch.Tensor:
        begin = clock()
        scores = scorer(*given)
        seconds.append(clock() - begin)
        return scores

    return score


@torch.inference_mode()
def row(models: dict[str, Any], ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    dense: list[float] = []
    ghosts: list[Spent] = []
    for model in models.values():
        prefill(model, ids[:, :256])  # what is made or compiled when it is first used
    for _ in range(rounds):
        dense.append(prefill(models["dense"], ids))
        ghosts.append(timed_prefill(models["ghost"], ids))
    by_torch = timed_prefill(models["ghost"], ids, ghost_scores)

    def share(seconds: list[float]) -> float:
        return round(100 * median(s / d for s, d in zip(seconds, dense, strict=True)), 1)

    return {
        "dense s": round(median(dense), 2),
        "scores %": share([x.scores for x in ghosts]),
        "observed %": share([x.observed for x in ghosts]),
        "selected %": share([x.selected for x in ghosts]),
        "torch scores %": share([by_torch.scores] * rounds),
        "prefill %": round(share([x.whole for x in ghosts]) - 100, 1),
    }


def main() -> None:
    """Parse, measure, print and write Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = []
    for dtype in args.dtypes:
        model, tokenizer = load(ModelConfig(dtype=dtype))
        ids = torch.tensor([tokenizer(" ".join(sentences()))["input_ids"]])
        models = {"dense": kvcompile.compile(shared(model), overrides=["policy=[]"])}
        models["ghost"] = kvcompile.compile(shared(model), recipe="ghost")
        for context in args.contexts:
            rows.append({"dtype": dtype, "context": context, **row(models, ids[:, :context], args.rounds)})
            print(rows[-1], flush=True)
    show(args.out, rows)


if __name__ == "__main__":
    main()
