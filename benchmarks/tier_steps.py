"""A decode step of leankv, whose every token may push an entry down or out: by the generated demoter, and by torch's.

    python benchmarks/tier_steps.py --contexts 1024 4096 --out benchmarks/results/tier_steps

Three caches of one prompt take steps in turns: no tiers, tiers with the generated demoter, the same with torch's; the
last two must give the same logits to the bit. Ratios are medians over the rounds. Run it on a machine that does
nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from tables import show

import kvcompile
from kvcompile.calibration.text import sentences
from kvcompile.config.schema import ModelConfig
from kvcompile.kernels.demote import demote
from kvcompile.models.loading import load
from kvcompile.models.sharing import shared

STEPS = 8  # of a turn


@torch.inference_mode()
def race(models: dict[str, Any], ids: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """One row a cache."""
    caches = {label: models[label](ids, logits_to_keep=1).past_key_values for label in ("dense", "tiers")}
    caches["tiers, torch demotes"] = caches["tiers"].fork()
    caches["tiers, torch demotes"].backend = replace(caches["tiers"].backend, demote=demote)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    token, taken = torch.full((1, 1), 42), {label: list[float]() for label in caches}
    for round_ in range(rounds + 1):  # the first one warms up
        last = {}
        for label, cache in caches.items():
            seconds = []
            for _ in range(STEPS):
                begin = clock()
                last[label] = models[label.split(",")[0]](token, past_key_values=cache).logits
                seconds.append(clock() - begin)
            if round_:
                taken[label].append(statistics.median(seconds))
        if not torch.equal(last["tiers"], last["tiers, torch demotes"]):
            raise SystemExit("the generated demoter gives other logits than torch's")
    base = taken["tiers, torch demotes"]
    return [
        {
            "row": label,
            "ms a token": round(1000 * statistics.median(of_row), 1),
            "x torch demotes": round(statistics.median(b / t for b, t in zip(base, of_row, strict=True)), 2),
            "cache MB": round(caches[label].nbytes() / 1e6, 2),
        }
        for label, of_row in taken.items()
    ]


def main() -> None:
    """Parse, run, print and write Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--overrides", nargs="*", default=["stack.leankv.alpha_low=0.3"])
    parser.add_argument("--out")
    args = parser.parse_args()
    model, tokenizer = load(ModelConfig())
    models = {"dense": kvcompile.compile(shared(model), overrides=["policy=[]"])}
    models["tiers"] = kvcompile.compile(shared(model), recipe="leankv", overrides=args.overrides)
    ids = torch.tensor([tokenizer(" ".join(sentences()))["input_ids"]])
    rows = []
    for context in args.contexts:
        rows += [{"context": context, **row} for row in race(models, ids[:, :context], args.rounds)]
    show(args.out, rows, "float32")


if __name__ == "__main__":
    main()
