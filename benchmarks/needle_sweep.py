"""Which stack keeps the needle at which bytes: many stacks on the same prefills of the default model.

    python benchmarks/needle_sweep.py --stacks benchmarks/stacks/zigzag.txt --tokens 1024 2048 --samples 20

Each line of a stacks file is a row: `label: recipe and overrides as on the command line`. Per row: share of KV bytes
kept (measured from the caches), needle score per length and form (greedy decoding says the answer, RULER's measure;
`exact`: and no digit after it), perplexity of a continued text (prefill 512 tokens, score the next 128).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from kvcompile.analysis.compare.branching import Branching
from kvcompile.build import plan_of
from kvcompile.calibration.probe import Remembering
from kvcompile.calibration.text import sentences
from kvcompile.config.compose import compose
from kvcompile.config.schema import ModelConfig
from kvcompile.evaluation.needle import NeedleTask
from kvcompile.models.loading import load
from kvcompile.plan.plan import Plan
from kvcompile.progress import silent


def stacks(path: str) -> dict[str, list[str]]:
    """label -> overrides."""
    lines = [line.strip() for line in Path(path).read_text().splitlines()]
    return {label.strip(): rest.split() for label, _, rest in (x.partition(":") for x in lines if x and x[0] != "#")}


def plans(rows: dict[str, list[str]], model: Any, calibrated: Any) -> dict[str, Plan]:
    """label -> plan (calibrating where a policy asks for it)."""
    out = {}
    for label, overrides in rows.items():
        config = compose(overrides)
        policies = tuple(p.calibrated(calibrated) for p in config.policies())
        out[label] = plan_of(model.config, "float32", config, policies)
    return out


def rotated(plan: Plan | None) -> bool:
    """Whether a stack holds keys and values in the Hadamard basis; None is the dense model."""
    return plan is not None and any(p.storage.rotated for p in plan.layers)


def bases(model: Any, all_plans: dict[str, Plan]) -> dict[bool, Branching]:
    """What prefills for the plans that are `rotated`, and for the others and the dense model."""
    return {basis: Branching(model, rotated=basis) for basis in {False, *map(rotated, all_plans.values())}}


def needles(
    runs: dict[bool, Branching], tokenizer: Any, all_plans: dict[str, Plan], task: NeedleTask
) -> dict[str, list[Any]]:
    """label -> [found, exact, share of bytes kept] over one task; None is the dense model."""
    found, exact = dict.fromkeys([None, *all_plans], 0), dict.fromkeys([None, *all_plans], 0)
    kept = dict.fromkeys(all_plans, 0.0)
    prompts = task.prompts(tokenizer)
    for done, prompt in enumerate(prompts):
        for run in runs.values():
            run.prefill(prompt.ids)
        answers = [
            tokenizer(f" {q}{prompt.answer}", add_special_tokens=False)["input_ids"] for q in ("", '"', "**", ":")
        ]
        for label in found:
            plan = None if label is None else all_plans[label]
            run = runs[rotated(plan)]
            cache = run.branch(plan or run.identity)
            if label is not None:
                dense = run.cache.nbytes() if run.cache else 1
                kept[label] += cache.nbytes() / dense / len(prompts)
            follows = run.says(cache, answers)
            found[label] += follows is not None
            exact[label] += follows is not None and not tokenizer.decode([follows])[:1].isdigit()
        print(f"{task.form} {task.tokens}: {done + 1}/{len(prompts)}", file=sys.stderr, flush=True)
    n = len(prompts)
    return {label or "dense": [found[label] / n, exact[label] / n, kept.get(label, 1.0)] for label in found}


def perplexities(
    runs: dict[bool, Branching], tokenizer: Any, all_plans: dict[str, Plan], windows: int
) -> dict[str, float]:
    """label -> perplexity of the next 128 tokens after 512, over `windows` places of the text."""
    ids = tokenizer(" ".join(sentences()))["input_ids"]
    losses: dict[str, list[float]] = {label: [] for label in ("dense", *all_plans)}
    for w in range(windows):
        start = w * (len(ids) - 700) // windows
        for run in runs.values():
            run.prefill(ids[start : start + 512])
        for label, found in losses.items():
            run = runs[rotated(all_plans.get(label))]
            cache = run.branch(all_plans.get(label, run.identity))
            found.append(run.loss(cache, ids[start + 512 : start + 640]))
    return {label: math.exp(sum(found) / len(found)) for label, found in losses.items()}


def main() -> None:
    """Parse, run, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", required=True)
    parser.add_argument("--rows", nargs="+", default=[""], help="only the rows whose label contains one of these")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--forms", nargs="+", default=["magic"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out")
    args = parser.parse_args()
    model, tokenizer = load(ModelConfig())
    rows = {
        label: overrides for label, overrides in stacks(args.stacks).items() if any(part in label for part in args.rows)
    }
    all_plans = plans(rows, model, Remembering(model, tokenizer, silent))
    runs = bases(model, all_plans)
    table: dict[str, dict[str, Any]] = {label: {"stack": " ".join(rows.get(label, []))} for label in ("dense", *rows)}
    for form in args.forms:
        for tokens in args.tokens:
            task = NeedleTask(tokens=tokens, samples=args.samples, form=form, seed=args.seed)
            for label, (found, exact, kept) in needles(runs, tokenizer, all_plans, task).items():
                table[label][f"{form} {tokens}"] = round(100 * found, 1)
                table[label][f"exact {tokens}"] = round(100 * exact, 1)
                table[label][f"kept % {tokens}"] = round(100 * kept, 2)
            print(tabulate([{"row": k, **v} for k, v in table.items()], headers="keys"), file=sys.stderr, flush=True)
    if args.windows:
        for label, value in perplexities(runs, tokenizer, all_plans, args.windows).items():
            table[label]["perplexity"] = round(value, 2)
    lines = [{"row": label, **{k: v for k, v in row.items() if k != "stack"}} for label, row in table.items()]
    text = tabulate(lines, headers="keys", tablefmt="github")
    print(text)
    if args.out:
        head = f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, torch {torch.__version__}, "
        head += f"{args.samples} samples a cell\n\n    python {shlex.join(sys.argv)}\n\n"
        stack_lines = "\n".join(f"- {label}: `{' '.join(rows[label])}`" for label in rows)
        Path(args.out + ".md").write_text(f"{head}{text}\n\n{stack_lines}\n")
        Path(args.out + ".json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
