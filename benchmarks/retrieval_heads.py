r"""How many retrieval heads, and what for the others: one calibration of the default model, then real caches.

    python benchmarks/retrieval_heads.py --samples 5 --out benchmarks/results/retrieval_heads
    python benchmarks/retrieval_heads.py --samples 10 --seed 1 --rows recipe \
        --out benchmarks/results/retrieval_heads-held_out

Calibration uses the forms of `kvcompile.calibration.retrieval`, the scores those of `kvcompile.evaluation.needle`: no
form is in both.
Columns: share of KV bytes held after prefill (measured), exact-match needle score per form and length, perplexity of
128 tokens read after 512 over the compressed cache. The calibration itself goes to
`<out>-calibration.json` (unless --rows is given).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from needle_sweep import bases, needles, perplexities
from tabulate import tabulate

from kvcompile.build import plan_of
from kvcompile.calibration.probe import ModelCalibrator
from kvcompile.calibration.retrieval import CalibrationResult, retrieval_scores
from kvcompile.calibration.text import sentences
from kvcompile.config.compose import compose
from kvcompile.config.schema import ModelConfig
from kvcompile.evaluation.needle import NeedleTask
from kvcompile.models.loading import load
from kvcompile.stack import build_policy

LESS = {"budget": 18, "recent": 14}
ROWS: dict[str, tuple[int, dict[str, Any]]] = {  # label -> number of heads, fields of the policy
    "no head, sinks + 32": (0, {}),
    "10 heads, sinks + 32": (10, {}),
    "10 heads, expected attention to 4 %": (10, {"budget": 0.04, "recent": 16, "score": "expected_attention"}),
    "12 heads, sinks + 14": (12, {"budget": 18, "recent": 14}),
    "13 heads, 90 % by expected attention, sinks + 14": (13, {"keep": 0.9, "score": "expected_attention"} | LESS),
    "14 heads, 75 % by expected attention": (14, {"keep": 0.75, "score": "expected_attention"}),
    "15 heads, 80 % by expected attention, sinks + 14": (15, {"keep": 0.8, "score": "expected_attention"} | LESS),
    "16 heads, 75 % by expected attention, sinks + 14": (16, {"keep": 0.75, "score": "expected_attention"} | LESS),
    "16 heads, 75 % by snapkv, sinks + 14": (16, {"keep": 0.75, "score": "snapkv"} | LESS),
    "18 heads, 60 % by expected attention": (18, {"keep": 0.6, "score": "expected_attention"}),
    "20 heads, 55 % by expected attention, sinks + 14": (20, {"keep": 0.55, "score": "expected_attention"} | LESS),
    "22 heads, 50 % by expected attention": (22, {"keep": 0.5, "score": "expected_attention"}),
}
CASES = [(form, 1024) for form in ("magic", "two_keys", "reference", "passcode")] + [
    ("magic", 2048),
    ("passcode", 2048),
]


def show(found: CalibrationResult, count: int) -> str:
    """The best heads of every form, as layer.head."""
    parts = {"all forms": found.scores, **found.forms}
    lines = []
    for name, rows in parts.items():
        best = CalibrationResult(rows, {}, 0, 0, 0).top(count)
        lines.append({"form": name, "best KV heads": " ".join(f"{i}.{h}" for i, h in best)})
    return tabulate(lines, headers="keys", tablefmt="github")


def main() -> None:
    """Calibrate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5, help="prompts of each form and length")
    parser.add_argument("--windows", type=int, default=6, help="texts of the perplexity")
    parser.add_argument("--rows", default="", help="only the rows whose label contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    args = parser.parse_args()
    model, tokenizer = load(ModelConfig())
    policy: Any = build_policy("retrieval_heads", {})
    settings = {name: getattr(policy, name) for name in ("samples", "tokens", "seed")}
    found = retrieval_scores(ModelCalibrator(model, tokenizer, progress), sentences(), **settings)
    plans = {}
    for label, (count, fields) in ((k, v) for k, v in ROWS.items() if args.rows in k):
        name = "retrieval_heads" if count else "streaming"
        options = {"heads": found.top(count), **fields} if count else {"budget": 36}
        plans[label] = plan_of(model.config, "float32", compose([]), (build_policy(name, options),))
    runs = bases(model, plans)
    table: dict[str, dict[str, Any]] = {label: {} for label in ("dense", *plans)}
    for form, tokens in CASES:
        task = NeedleTask(tokens=tokens, samples=args.samples, form=form, seed=args.seed)
        for label, (score, _, kept) in needles(runs, tokenizer, plans, task).items():
            table[label].setdefault(f"kept % {tokens}", round(100 * kept, 1))
            table[label][f"{form} {tokens}"] = round(100 * score)
    for label, value in perplexities(runs, tokenizer, plans, args.windows).items():
        table[label]["perplexity"] = round(value, 2)
    text = tabulate([{"row": k, **v} for k, v in table.items()], headers="keys", tablefmt="github")
    text += "\n\n" + show(found, 14)
    print(text)
    if args.out:
        command = f"    python {' '.join(sys.argv)}\n\n{args.samples} prompts of each form and length\n\n"
        Path(args.out + ".md").write_text(command + text + "\n")
        if not args.rows:
            Path(args.out + "-calibration.json").write_text(json.dumps(found.to_json(), indent=1) + "\n")


def progress(text: str, done: int, total: int) -> None:
    """One line a step, on stderr."""
    print(f"{text}: {done}/{total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
