"""Our stacks, dense transformers, its QuantizedCache (hqq), kvpress and llama.cpp on the default model: one run.

    pip install hqq
    python benchmarks/peers.py --contexts 1024 4096 8000 --kvpress PYTHON --llama PYTHON --gguf FILE --out PATH

Every process has dense transformers of its own to be compared with, measured in turns with its rows; the processes
run one after the other. Decode: greedy steps over the caches that the prefills left, four of each row at a time; x: the
median over the rounds of dense transformers' step to the row's. Needle: `--samples` prompts of 1,024 tokens, answered
greedily. With --out, what is measured is kept after each part and context, and `--parts` measures some of it anew. Run
it on a machine that does nothing else, with the OpenMP defaults (its threads then spin between small operations).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from needle_sweep import stacks
from tabulate import tabulate
from transformers import QuantizedCache
from turns import Contestant, found, race, tensors_bytes

from kvcompile.adapters.architectures import describe
from kvcompile.build import plan_of
from kvcompile.calibration.probe import ModelCalibrator
from kvcompile.calibration.text import sentences
from kvcompile.compiler import compile_plan
from kvcompile.config.compose import compose
from kvcompile.config.schema import ModelConfig
from kvcompile.evaluation.needle import NeedleTask
from kvcompile.models.loading import load
from kvcompile.models.sharing import shared

HERE = Path(__file__).parent
PARTS = ("needle", "ours", "kvpress", "llama")
WORKERS = {"kvpress": "peer_kvpress.py", "llama": "peer_llama.py"}


def contestant(model: Any, cache: Any, size: Any) -> Contestant:
    """A transformers-like model with a cache of its own making."""

    def start(ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        mine = cache()
        return model(ids, past_key_values=mine, logits_to_keep=1).logits[:, -1], mine

    def step(token: torch.Tensor, mine: Any) -> torch.Tensor:
        at = torch.tensor([[mine.get_seq_length()]])
        return model(token, past_key_values=mine, position_ids=at, logits_to_keep=1).logits[:, -1]

    return Contestant(start, step, size)


def contestants(path: str, model: Any, tokenizer: Any) -> dict[str, Contestant]:
    """Dense transformers, its quantised caches, dense through our cache, and every stack of the file."""
    from transformers import DynamicCache

    def held(cache: Any) -> int:
        return tensors_bytes(cache.layers)

    rows = {"transformers": contestant(model, DynamicCache, held)}
    for bits in (8, 4):

        def quantised(bits: int = bits) -> Any:
            return QuantizedCache("hqq", model.config, nbits=bits, axis_key=1, axis_value=1, q_group_size=64)

        rows[f"transformers QuantizedCache hqq int{bits}"] = contestant(model, quantised, held)
    plans = {"kvcompile dense": describe(model.config)}
    calibrator = ModelCalibrator(model, tokenizer, lambda *_: None)
    for label, overrides in stacks(path).items():
        config = compose(overrides)
        policies = tuple(p.calibrated(calibrator) for p in config.policies())
        plans[f"kvcompile {label}"] = plan_of(model.config, "float32", config, policies)
    for label, plan in plans.items():
        ours = compile_plan(shared(model), plan)
        rows[label] = contestant(ours, ours.new_cache, lambda cache: cache.nbytes())
    return rows


def even(ids: list[int]) -> list[int]:
    """A prompt less a token of its first lines where their number is odd: hqq packs rows in pairs and fails there."""
    return ids if len(ids) % 2 == 0 else ids[:64] + ids[65:]


def foreign(python: str, script: str, job: dict[str, Any]) -> dict[str, Any]:
    """What a worker prints for the job."""
    done = subprocess.run([python, str(HERE / script)], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", default=str(HERE / "stacks" / "peers.txt"))
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tokens", type=int, default=16, help="decode steps of llama.cpp")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--kvpress", help="python of an environment with kvpress")
    parser.add_argument("--llama", help="python of an environment with llama-cpp-python")
    parser.add_argument("--gguf", help="the GGUF file for llama.cpp")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out")
    return parser.parse_args()


def measure(args: argparse.Namespace, results: dict[str, Any], keep: Callable[[], None]) -> None:
    """Put timings by context and row, and needle scores by row, of the parts asked for into the results."""
    model, tokenizer = load(ModelConfig())
    ids = tokenizer(" ".join(sentences()), return_tensors="pt")["input_ids"][0]
    asked = NeedleTask(tokens=1024, samples=args.samples).prompts(tokenizer)
    needle = [{"ids": even(p.ids), "answer": p.answer} for p in asked]
    c = model.config
    job = {
        "model": c._name_or_path,
        "gguf": args.gguf,
        "prompts": [ids[:n].tolist() for n in args.contexts],
        "needle": needle,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "kv_elements": 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim,
    }
    rows = contestants(args.stacks, model, tokenizer) if {"needle", "ours"} & set(args.parts) else {}
    if "needle" in args.parts:
        results["needle"] |= {name: found(row, needle, tokenizer.decode) for name, row in rows.items()}
        keep()
    for n in args.contexts if "ours" in args.parts else ():
        results["timed"].setdefault(str(n), {}).update(race(rows, ids[None, :n], args.rounds))
        keep()
    for part, python in (("kvpress", args.kvpress), ("llama", args.llama)):
        if python and part in args.parts:
            theirs = foreign(python, WORKERS[part], job)
            results["needle"] |= theirs.get("needle", {})
            for context, timed in theirs["timed"].items():
                results["timed"].setdefault(context, {}).update(timed)
            keep()


def section(context: str, rows: dict[str, Any], scores: dict[str, float]) -> str:
    """One context as Markdown."""
    table = [
        {
            "row": name,
            **{k: round(v, 2) for k, v in row.items()},
            "needle %": round(100 * scores[name]) if name in scores else None,
        }
        for name, row in rows.items()
    ]
    return f"### context {context}\n\n{tabulate(table, headers='keys', tablefmt='github')}\n"


def main() -> None:
    """Parse, run, print and write Markdown and JSON."""
    args = arguments()
    kept = Path(f"{args.out}.json")
    results: dict[str, Any] = {"timed": {}, "needle": {}, "commands": []}
    if args.out and kept.exists() and set(args.parts) < set(PARTS):
        results |= json.loads(kept.read_text())
    results["commands"].append(f"{time.strftime('%Y-%m-%d')}: python {' '.join(sys.argv)}")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    listed = "\n".join(f"- {k}: `{' '.join(v)}`" for k, v in stacks(args.stacks).items())

    def keep() -> None:
        if args.out:
            text = [section(context, rows, results["needle"]) for context, rows in results["timed"].items()]
            head = "\n".join((machine, "", *(f"    {line}" for line in results["commands"]), "", listed, ""))
            Path(f"{args.out}.md").write_text("\n".join([head, *text]))
            kept.write_text(json.dumps(results, indent=1) + "\n")

    measure(args, results, keep)
    print("\n".join(section(context, rows, results["needle"]) for context, rows in results["timed"].items()))


if __name__ == "__main__":
    main()
