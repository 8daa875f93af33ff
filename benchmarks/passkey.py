r"""A pass key in a text longer than the model was trained on: what infllm finds, and what a window alone finds.

    python benchmarks/passkey.py --tokens 4096 12288 --out benchmarks/results/passkey
    python benchmarks/passkey.py --tokens 16384 32768 --rows infllm streaming --depths 0.25 \
        --out benchmarks/results/passkey

The default model was trained to 8,192 positions. A number stands in a text of a few plain sentences said over and over;
the prompt asks for it at its end, and an answer is right where it begins with that number. Rows: the uncompressed model
(up to its trained length), the recipe infllm, the same with far tokens at their own distances or with blocks of 128,
and streaming with compact positions, which holds as many tokens as infllm reads.
Positions: the rotary position of the last token. Read: bytes of keys, values and index in the last decode step.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from kvcompile.compiler import compile_plan, plan_config
from kvcompile.config.compose import compose
from kvcompile.config.schema import ModelConfig
from kvcompile.models.loading import load
from kvcompile.models.sharing import shared

TRAINED = 8192
NOISE = "The river is wide. The bread is warm. The road goes on. Snow falls in the hills. We walk there and come home. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
INTRO = "There is one important thing hidden in a lot of text that does not matter. Find it and remember it. "
QUESTION = "What is the pass key? The pass key is"
ROWS: dict[str, list[str]] = {
    "dense": [],
    "infllm": ["recipe=infllm"],
    "infllm, own distances": ["recipe=infllm", "stack.infllm.far=original"],
    "infllm, blocks of 128": ["recipe=infllm", "stack.infllm.block=128", "stack.infllm.every=128"],
    "streaming": [
        "recipe=streaming",
        *(f"stack.streaming.{x}" for x in ("sinks=64", "budget=2112", "positions=compact")),
    ],
}


def prompt(tokenizer: Any, tokens: int, depth: float, seed: int) -> tuple[list[int], str]:
    """Ids of at most `tokens` tokens with the key after a share `depth` of the noise; the key."""
    key = "".join(random.Random(f"{seed}/{tokens}/{depth}").sample("123456789", 5))

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    start, noise, needle, end = (ids(t) for t in (INTRO, NOISE, NEEDLE.format(key=key), QUESTION))
    times = (tokens - len(start) - len(needle) - len(end)) // len(noise)
    before = round(depth * times)
    return [*start, *noise * before, *needle, *noise * (times - before), *end], key


def answered(model: Any, tokenizer: Any, ids: list[int], new: int = 6) -> dict[str, Any]:
    """What the model says, greedily, and what it read for that."""
    tokens, said = torch.tensor([ids], dtype=torch.int64, device=model.device), []
    with torch.inference_mode():
        out = model(tokens, logits_to_keep=1)
        for _ in range(new):
            said.append(int(out.logits[0, -1].argmax()))
            if hasattr(out.past_key_values, "reads"):
                out.past_key_values.reads = {}
            out = model(
                torch.tensor([said[-1:]], dtype=torch.int64, device=model.device), past_key_values=out.past_key_values
            )
    cache = out.past_key_values
    result = {"text": tokenizer.decode(said), "tokens": len(ids)}
    if hasattr(cache, "reads"):
        shift = 0 if cache.shift is None else int(cache.shift[0])
        result |= {"positions": cache.seen[0] - shift, "read": sum(cache.reads.values()), "held": cache.nbytes()}
    return result


def main() -> None:
    """Ask, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 12288])
    parser.add_argument("--depths", type=float, nargs="+", default=[0.25, 0.6])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="results are added to those of the file")
    args = parser.parse_args()
    model, tokenizer = load(ModelConfig())
    records: list[dict[str, Any]] = []
    if args.out and Path(args.out + ".json").exists():
        records = json.loads(Path(args.out + ".json").read_text())
    for tokens in args.tokens:
        for label in args.rows:
            if label == "dense" and tokens > TRAINED:
                continue
            config = compose([*ROWS[label], f"prefill_chunk={args.chunk}"])
            stack = plan_config(config, model.config)
            run = compile_plan(shared(model), stack.plan) if ROWS[label] else model
            for depth in args.depths:
                ids, key = prompt(tokenizer, tokens, depth, args.seed)
                record = {"row": label, "asked": tokens, "depth": depth, "key": key, **answered(run, tokenizer, ids)}
                record["command"] = " ".join(sys.argv)
                record["right"] = record["text"].strip().startswith(key)
                print(record, file=sys.stderr, flush=True)
                alike = ("row", "asked", "depth", "key")
                records = [r for r in records if any(r[x] != record[x] for x in alike)] + [record]
                write(records, args.out)


def write(records: list[dict[str, Any]], out: str | None) -> None:
    """One line a row and length."""
    lines = []
    for tokens, label in sorted({(r["asked"], r["row"]) for r in records}):
        runs = [r for r in records if (r["asked"], r["row"]) == (tokens, label)]
        last = runs[-1]
        megabytes = {x: f"{last[x] / 1e6:.1f}" if x in last else "" for x in ("held", "read")}
        lines.append(
            {
                "tokens": f"{tokens:,}",
                "row": label,
                "right": f"{sum(r['right'] for r in runs)} of {len(runs)}",
                "positions": f"{last.get('positions', last['tokens']):,}",
                "MB held": megabytes["held"],
                "MB read": megabytes["read"],
            }
        )
    text = tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
    if out:
        commands = "\n".join(sorted({f"    python {r['command']}" for r in records}))
        Path(out + ".md").write_text(f"{commands}\n\n{text}\n")
        Path(out + ".json").write_text(json.dumps(records, indent=1) + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
