"""SmolLM2 as a block transformer: bytes, speed at one sequence and at the largest batch of a memory, and perplexity.

    export OMP_WAIT_POLICY=PASSIVE
    python benchmarks/block_transformer.py --memory 1 --healed outputs/block_transformer_heal-llama \\
        --out benchmarks/results/block_transformer

Dense transformers, dense through our cache and the block transformer share weights and take turns in one process. A
decode step of the block transformer is the mean over a block: one step in so many runs the block decoder. `--memory`
is GiB for keys and values alone; the largest batch is what the plan says fits. Perplexity is read through the cache, of
the original, of the conversion as it is, and of `--healed`, an artifact of `kvcompile recipe=block_transformer_heal`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.build import plan_of
from kvcompile.calibration.text import sentences
from kvcompile.compiler import compile_plan
from kvcompile.config.compose import compose
from kvcompile.evaluation.perplexity import cached_perplexity, forward
from kvcompile.evaluation.speed import cache_bytes, compare
from kvcompile.heal.corpus import held_out
from kvcompile.models.loading import load
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import Plan
from kvcompile.report import files

Rows = list[dict[str, Any]]


def one_sequence(models: dict[str, Any], ids: torch.Tensor, context: int, args: argparse.Namespace) -> Rows:
    """Speed and bytes of a batch of one."""
    found = compare(models, ids[None, :context], args.block * args.decoded, args.rounds)
    return [
        {
            "model": name,
            "cache MB": round(s.cache_bytes / 1e6, 2),
            "KB a token": round(s.cache_bytes / context / 1e3, 2),
            "prefill s": round(s.prefill_s, 2),
            "decode ms": round(1000 * s.step_s, 1),
            "tokens/s": round(s.decode_tokens_s, 1),
            "decode x": round(found.decode_ratio[name], 2),
        }
        for name, s in found.speeds.items()
    ]


def largest(plan: Plan, tokens: int, memory: float) -> int:
    """The sequences whose keys and values after so many `tokens` fit into `memory` GiB."""
    return int(memory * 2**30 // sum(row.bytes for row in plan.bytes(1, tokens)))


@torch.inference_mode()
def at_the_largest_batch(
    models: dict[str, Any], plans: dict[str, Plan], ids: torch.Tensor, args: argparse.Namespace
) -> Rows:
    """Each model decodes as many sequences as fit; models in turns, medians of the rounds."""
    steps = args.block * args.decoded
    tokens = args.memory_context + steps
    batches = {name: min(args.most, largest(plan, tokens, args.memory)) for name, plan in plans.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    held: dict[str, int] = {}
    for _ in range(args.rounds):
        for name, model in models.items():
            starts = [i * 53 % (len(ids) - args.memory_context) for i in range(batches[name])]
            prompts = torch.stack([ids[s : s + args.memory_context] for s in starts])
            began = time.perf_counter()
            logits, cache = forward(model, prompts)
            middle = time.perf_counter()
            for _ in range(steps):
                logits, cache = forward(model, logits.argmax(-1, keepdim=True), cache)
            end = time.perf_counter()
            taken[name].append((prompts.numel() / (middle - began), batches[name] * steps / (end - middle)))
            held[name] = cache_bytes(cache)
            del cache
    rows = []
    for name, rates in taken.items():
        prefill, decode = (statistics.median(part) for part in zip(*rates, strict=True))
        ratio = statistics.median(d / b for (_, d), (_, b) in zip(rates, taken["transformers"], strict=True))
        rows.append(
            {
                "model": name,
                "batch": batches[name],
                "cache MB": round(held[name] / 1e6, 1),
                "prefill tokens/s": round(prefill),
                "decode tokens/s": round(decode, 1),
                "decode x": round(ratio, 2),
            }
        )
    return rows


def perplexities(models: dict[str, Any], ids: torch.Tensor, args: argparse.Namespace) -> Rows:
    """Through the cache, on text that nothing was trained on."""
    read = {name: cached_perplexity(m, ids, args.text_context, 96, args.windows) for name, m in models.items()}
    return [{"model": name, "perplexity": round(value, 2)} for name, value in read.items()]


def healing(path: Path | None) -> str:
    """What the healed artifact has gone through, by its report."""
    record = files.read(path).healed if path else None
    if record is None:
        return ""
    original, converted, healed = record.perplexity
    return (
        f"Healed on {record.tokens:,} tokens of {record.source}, {record.seconds / 60:.1f} minutes; "
        f"{record.parameters:,} parameters trained; whole sequences without a cache: {original:.2f} originally, "
        f"{converted:,.2f} converted, {healed:,.2f} healed.\n"
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8000])
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--decoded", type=int, default=6, help="blocks of tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, default=1.0, help="GiB of keys and values for the largest batch")
    parser.add_argument("--memory-context", type=int, default=2048, help="tokens of its prompts")
    parser.add_argument("--most", type=int, default=512, help="sequences, where more would fit")
    parser.add_argument("--healed", type=Path, help="an artifact of recipe=block_transformer_heal")
    parser.add_argument("--text-context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Measure, print and write."""
    args = parsed()
    config = compose(["policy=[block_transformer]", f"stack.block_transformer.block={args.block}"])
    model, tokenizer = load(config.model)
    ids = tokenizer(" ".join(sentences()), return_tensors="pt")["input_ids"][0]
    dense = describe(model.config)
    plans = {
        "transformers": dense,
        "dense": dense,
        "block transformer": plan_of(model.config, "float32", config, config.policies()),
    }
    models = {"transformers": model}
    models |= {name: compile_plan(shared(model), plan) for name, plan in plans.items() if name != "transformers"}
    parts: dict[str, Rows] = {}
    for context in args.contexts:
        parts[f"{context} tokens, one sequence"] = one_sequence(models, ids, context, args)
    title = f"{args.memory_context} tokens, the largest batch in {args.memory:g} GiB of keys and values"
    parts[title] = at_the_largest_batch(models, plans, ids, args)
    quality = {"original": models["dense"], "converted": models["block transformer"]}
    if args.healed:
        quality["healed"] = kvcompile.load(args.healed)
    parts["perplexity, read through the cache"] = perplexities(quality, held_out(config, tokenizer), args)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    head = f"{time.strftime('%Y-%m-%d')}, {machine}\n\n    python {' '.join(sys.argv)}\n\n{healing(args.healed)}"
    body = "\n".join(f"## {title}\n\n{tabulate(rows, 'keys', tablefmt='pipe')}\n" for title, rows in parts.items())
    print(body)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(f"{head}\n{body}", encoding="utf-8")
    facts = {"command": sys.argv[1:], "machine": machine, "parts": parts}
    args.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
