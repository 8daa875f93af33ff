"""How stable calibrated budgets are: the shares of heads on other seeds, on another text, and at other budgets.

    python benchmarks/head_budgets.py --wikitext FILE --out benchmarks/results/head_budgets

overlap: sum over heads of the smaller of two shares, 1 where they are the same. top: of the heads that hold nine tenths
of the free entries in either, the part that does in both. Each number is the mean over all pairs of calibrations, and
the least of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from haystacks import add_arguments, command, haystacks
from tabulate import tabulate

from kvcompile.calibration.budgets import head_shares
from kvcompile.calibration.probe import ModelCalibrator
from kvcompile.config.compose import compose
from kvcompile.models.loading import load
from kvcompile.plan.selection import Selection
from kvcompile.policies.global_topk import GlobalTopK

MOST = 0.9  # of the free entries: whose heads are `top`
Shares = dict[tuple[int, int], float]


def overlap(one: Shares, other: Shares) -> float:
    """Sum of the smaller shares, in [0, 1]."""
    return sum(min(share, other[head]) for head, share in one.items())


def top(shares: Shares) -> set[tuple[int, int]]:
    """The fewest heads that hold `MOST`."""
    best, held = set(), 0.0
    for head, share in sorted(shares.items(), key=lambda item: -item[1]):
        if held >= MOST:
            break
        best.add(head)
        held += share
    return best


def compared(pairs: Sequence[tuple[Shares, Shares]]) -> dict[str, str]:
    """Columns of a row."""
    overlaps = [overlap(a, b) for a, b in pairs]
    tops = [len(top(a) & top(b)) / len(top(a) | top(b)) for a, b in pairs]
    return {
        "pairs": str(len(pairs)),
        "overlap, mean (least)": f"{statistics.fmean(overlaps):.2f} ({min(overlaps):.2f})",
        "top, mean (least)": f"{statistics.fmean(tops):.2f} ({min(tops):.2f})",
    }


def selection(budget: float) -> Selection:
    """Ghosts of all heads in one budget, the texts compressed at their end."""
    policy = GlobalTopK(budget=budget)
    return policy.over(policy.alone())


def main() -> None:
    """Calibrate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=[], help="as on the command line: model=qwen2 model.pretrained=x")
    add_arguments(parser)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.11, 0.2])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(replace(compose(args.model).model, dtype="float32", device="cpu"))
    calibrator = ModelCalibrator(model, tokenizer, lambda *_: None)
    found: dict[tuple[float, str, int], Shares] = {}
    for budget, (name, text), seed in itertools.product(
        args.budgets, haystacks(args.wikitext, args.half).items(), range(args.seeds)
    ):
        how: dict[str, Any] = {"samples": args.samples, "tokens": args.tokens, "seed": seed}
        rows = head_shares(calibrator, text, selection(budget), **how)
        found[budget, name, seed] = {(i, h): share for i, row in enumerate(rows) for h, share in enumerate(row)}
        print(f"{budget} {name} {seed}", file=sys.stderr, flush=True)
    Path(args.out + ".md").write_text(f"    {command()}\n\n{table(found)}\n", encoding="utf-8")
    data = [{"budget": b, "text": t, "seed": s, "shares": list(x.values())} for (b, t, s), x in found.items()]
    Path(args.out + ".json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    print(table(found))


def table(found: dict[tuple[float, str, int], Shares]) -> str:
    """A row for each kind of difference."""
    lines = []
    pairs = list(itertools.combinations(found, 2))
    for budget in dict.fromkeys(b for b, _, _ in found):
        here = [(a, b) for a, b in pairs if a[0] == b[0] == budget]
        seeds = [(found[a], found[b]) for a, b in here if a[1] == b[1]]
        texts = [(found[a], found[b]) for a, b in here if a[1] != b[1]]
        heads = [len(top(x)) for (b, _, _), x in found.items() if b == budget]
        for what, which in (("another seed", seeds), ("another text", texts)):
            if which:
                few = f"{min(heads)}-{max(heads)} of {len(next(iter(found.values())))}"
                lines.append({"budget": budget, "differs": what, **compared(which), "heads with 90 %": few})
    others = [(found[a], found[b]) for a, b in pairs if a[0] != b[0] and a[1:] == b[1:]]
    if others:
        lines.append({"budget": "any two", "differs": "the budget", **compared(others)})
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
