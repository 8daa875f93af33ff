"""Which settings of clusterkv read what a query asks for, on the default model and the built-in text.

    OMP_NUM_THREADS=1 python benchmarks/cluster_recall.py --out benchmarks/results/cluster_recall

Every prompt is read once; each setting groups a copy of that cache and goes on from there, token by token. cluster
recall: share of the tokens that a query would score highest which are read, mean over layers, heads and steps.
perplexity: of the `--steps` tokens that follow `--context` tokens, in `--windows` places. needles: the question's
end comes as decoded tokens (`--hidden` of them), the answer is generated.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from recall_index import compiled, regrouped
from tabulate import tabulate

from kvcompile.calibration.text import sentences
from kvcompile.config.schema import ModelConfig
from kvcompile.evaluation.needle import NeedleTask
from kvcompile.evaluation.recall import metered
from kvcompile.evaluation.speed import forward
from kvcompile.models.loading import load

SETTINGS = {
    "everything": ["budget=1000000"],
    "1/8, clusters of 80": ["budget=0.125"],
    "1/8, clusters of 20": ["budget=0.125", "tokens_per_cluster=20"],
    "1/8, clusters of 20, max": ["budget=0.125", "tokens_per_cluster=20", "agree=max"],
    "1/8, clusters of 20, reuse 4": ["budget=0.125", "tokens_per_cluster=20", "reuse=4"],
    "1/16, clusters of 20": ["budget=0.0625", "tokens_per_cluster=20"],
    "1/4, clusters of 80": ["budget=0.25"],
}


class Trial:
    """One setting: its model, and what was measured."""

    def __init__(self, model: Any, fields: list[str]) -> None:
        self.model = compiled(model, ["policy=[clusterkv]", *(f"stack.clusterkv.{field}" for field in fields)])
        self.recalls: list[float] = []
        self.losses: list[float] = []
        self.right: list[bool] = []

    def continued(self, cache: Any, ids: torch.Tensor, metering: bool = False) -> tuple[torch.Tensor, Any]:
        """Logits that follow each of `ids [1, n]`, token by token, and the cache."""
        branch, _ = regrouped(cache, self.model.kvcompile.plan)
        with metered(self.model) if metering else nullcontext({}) as recalls:
            logits = torch.cat([self.model(token, past_key_values=branch).logits for token in ids.split(1, 1)], 1)
        self.recalls += [statistics.mean(numbers) for numbers in recalls.values()]
        return logits[0], branch

    def row(self, name: str) -> dict[str, Any]:
        """The table row."""
        return {
            "setting": name,
            "cluster recall": round(statistics.mean(self.recalls), 3) if self.recalls else None,
            "perplexity": round(math.exp(statistics.mean(self.losses)), 2) if self.losses else None,
            "needles": f"{sum(self.right)} of {len(self.right)}",
        }


@torch.inference_mode()
def perplexity(trials: dict[str, Trial], cache: Any, ids: torch.Tensor) -> None:
    """Read `ids [1, n]` on from a cache that has seen all before them."""
    for trial in trials.values():
        logits, _ = trial.continued(cache, ids[:, :-1], metering=True)
        trial.losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))


@torch.inference_mode()
def needle(trials: dict[str, Trial], cache: Any, ids: torch.Tensor, tokenizer: Any, answer: str, count: int) -> None:
    """Ask what is hidden in the text that a cache has seen."""
    for trial in trials.values():
        logits, branch = trial.continued(cache, ids)
        said = [int(logits[-1].argmax())]
        while len(said) < count:
            step = trial.model(torch.tensor([[said[-1]]]), past_key_values=branch)
            said.append(int(step.logits[0, -1].argmax()))
        trial.right.append(answer in tokenizer.decode(said))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--needle", type=int, default=1024, help="tokens of a needle prompt")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=26)
    parser.add_argument("--out")
    args = parser.parse_args()
    model, tokenizer = load(ModelConfig())
    trials = {name: Trial(model, fields) for name, fields in SETTINGS.items()}
    reader = trials["1/8, clusters of 80"].model
    text = tokenizer(" ".join(sentences()), return_tensors="pt")["input_ids"]
    for window in range(args.windows):
        start = window * (text.shape[1] - args.context - args.steps) // args.windows
        end = start + args.context
        with torch.inference_mode():
            _, cache = forward(reader, text[:, start:end])
        perplexity(trials, cache, text[:, end : end + args.steps])
        print([trial.row(name) for name, trial in trials.items()], file=sys.stderr, flush=True)
    task = NeedleTask(tokens=args.needle, samples=args.samples)
    for prompt in task.prompts(tokenizer):
        ids = torch.tensor([prompt.ids])
        with torch.inference_mode():
            _, cache = forward(reader, ids[:, : -args.hidden])
        needle(trials, cache, ids[:, -args.hidden :], tokenizer, prompt.answer, task.max_new_tokens)
        print([trial.row(name)["needles"] for name, trial in trials.items()], file=sys.stderr, flush=True)
    table = tabulate([trial.row(name) for name, trial in trials.items()], headers="keys", tablefmt="github")
    print(table)
    if args.out:
        head = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        shown = "\n".join(f"- {name}: `{' '.join(fields)}`" for name, fields in SETTINGS.items())
        Path(args.out + ".md").write_text(f"{head}\n\n    python {' '.join(sys.argv)}\n\n{table}\n\n{shown}\n")


if __name__ == "__main__":
    main()
