"""Prefill, decode, cache bytes and peak memory of recipes against dense transformers: one process, in turns.

    export OMP_WAIT_POLICY=PASSIVE
    python benchmarks/whole_model.py --contexts 1024 2048 4096 8000 --out benchmarks/results/whole_model

Each model reads the same text of the default model; all share one set of weights. Decode is the median step. Ratios
are medians of the ratios of each round, above 1 for faster or smaller than dense transformers.
A row is `label: recipe and overrides as on the command line` (`--stacks FILE`), on top of the two dense rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from needle_sweep import stacks
from tabulate import tabulate

from kvcompile.adapters.architectures import describe
from kvcompile.build import plan_of
from kvcompile.calibration.probe import ModelCalibrator
from kvcompile.calibration.text import sentences
from kvcompile.compiler import compile_plan
from kvcompile.config.compose import compose
from kvcompile.config.schema import ModelConfig
from kvcompile.evaluation.speed import Comparison, compare
from kvcompile.models.loading import load
from kvcompile.models.sharing import shared

DEFAULT = "benchmarks/stacks/speed.txt"


def models(path: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Dense transformers, dense through our cache, and every stack of the file."""
    calibrator = ModelCalibrator(model, tokenizer, lambda *_: None)
    out = {"transformers": model, "dense": compile_plan(shared(model), describe(model.config))}
    for label, overrides in stacks(path).items():
        config = compose(overrides)
        policies = tuple(p.calibrated(calibrator) for p in config.policies())
        out[label] = compile_plan(shared(model), plan_of(model.config, "float32", config, policies))
    return out


def rows(found: Comparison) -> list[dict[str, Any]]:
    """One table row per model."""
    return [
        {
            "model": name,
            "prefill s": round(s.prefill_s, 2),
            "prefill x": round(found.prefill_ratio[name], 2),
            "decode ms": round(1000 * s.step_s, 1),
            "min ms": round(1000 * s.step_min_s, 1),
            "tokens/s": round(s.decode_tokens_s, 1),
            "decode x": round(found.decode_ratio[name], 2),
            "cache MB": round(s.cache_bytes / 1e6, 1),
            "cache x": round(found.cache_ratio[name], 1),
            "peak MB": round(s.peak_bytes / 1e6),
        }
        for name, s in found.speeds.items()
    ]


def main() -> None:
    """Parse, run, print and write Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", default=DEFAULT)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out")
    args = parser.parse_args()
    model, tokenizer = load(ModelConfig())
    ids = tokenizer(" ".join(sentences()), return_tensors="pt")["input_ids"][0]
    all_models = models(args.stacks, model, tokenizer)
    parts, data = [], []
    for batch in args.batches:
        for context in args.contexts:
            prompts = torch.stack([ids[i * 97 : i * 97 + context] for i in range(batch)])
            found = rows(compare(all_models, prompts, args.tokens, args.rounds))
            parts.append(
                f"### context {context}, batch {batch}\n\n{tabulate(found, headers='keys', tablefmt='github')}\n"
            )
            print(parts[-1], flush=True)
            data.append({"context": context, "batch": batch, "rows": found})
    if args.out:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        listed = "\n".join(f"- {k}: `{' '.join(v)}`" for k, v in stacks(args.stacks).items())
        head = f"{time.strftime('%Y-%m-%d')}, {machine}\n\n    python {' '.join(sys.argv)}\n\n{listed}\n"
        Path(args.out + ".md").write_text("\n".join([head, *parts]))
        Path(args.out + ".json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
