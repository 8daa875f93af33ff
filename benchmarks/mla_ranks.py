"""What MLA costs in quality at which bytes: perplexity through the cache at several ranks, choices and fits.

    python benchmarks/mla_ranks.py --out benchmarks/results/mla_ranks --text wikitext=wiki.test.txt

Each row is a stack on the default model, untrained. Per text: prefill `--context` tokens, score the next `--tokens` one
by one over the cache, on `--windows` windows spread over it. `builtin` is the offline text, of which the first half is
left out, since latents are fitted to its beginning.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from kvcompile.calibration.text import sentences
from kvcompile.compiler import assemble
from kvcompile.config.compose import compose
from kvcompile.evaluation.perplexity import cached_perplexity
from kvcompile.models.loading import load
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import Plan
from kvcompile.structure import absorb

ROWS = {
    "dense": [],
    "half, as by default": ["policy=[mla]"],
    "half, SVD of the weights": ["policy=[mla]", "stack.mla.factor=weights"],
    "half, components by norm": ["policy=[mla]", "stack.mla.select=norm"],
    "half, high frequencies": ["policy=[mla]", "stack.mla.select=high"],
    "half, uniform frequencies": ["policy=[mla]", "stack.mla.select=uniform"],
    "half, heads not mixed": ["policy=[mla]", "stack.mla.mix=false"],
    "half, rotation of the rest dropped": ["policy=[mla]", "stack.mla.damp=false"],
    "half, MHA2MLA (2-norm, heads, SVD)": [
        "policy=[mla]",
        *(f"stack.mla.{x}" for x in ("select=norm", "mix=false", "damp=false", "factor=weights")),
    ],
    "half, rope 32": ["policy=[mla]", "stack.mla.rope=32", "stack.mla.rank=160"],
    "half, rope 64": ["policy=[mla]", "stack.mla.rope=64", "stack.mla.rank=128"],
    "five sixths": ["policy=[mla]", "stack.mla.rope=64", "stack.mla.rank=256"],
    "two thirds": ["policy=[mla]", "stack.mla.rope=64", "stack.mla.rank=192"],
    "by energy 0.98": ["policy=[mla]", "stack.mla.energy=0.98"],
    "third": ["policy=[mla]", "stack.mla.rope=32", "stack.mla.rank=96"],
    "third, MQA": ["policy=[mqa]"],
}


def main() -> None:
    """Measure every row and write `<out>.json` and `<out>.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/mla_ranks")
    parser.add_argument("--text", action="append", default=[], help="name=path of another text")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rows", nargs="*", help="only rows that contain one of these")
    args = parser.parse_args()
    model, tokenizer = load(compose([]).model)
    texts = read(args.text, tokenizer)
    once(model)
    found = measured(args)
    for label, overrides in ROWS.items():
        if any(row["row"] == label for row in found) or (args.rows and not any(x in label for x in args.rows)):
            continue
        start = time.perf_counter()
        compiled = assemble(shared(model), compose(overrides), tokenizer)
        row: dict[str, Any] = {"row": label, "overrides": overrides, "bytes_per_token": per_token(compiled)}
        row["parameters"] = sum(p.numel() for p in compiled.parameters())
        for name, ids in texts.items():
            row[name] = cached_perplexity(compiled, ids, args.context, args.tokens, args.windows)
        row["seconds"] = round(time.perf_counter() - start)
        found.append(row)
        print(f"{label}: " + ", ".join(f"{name} {row[name]:.2f}" for name in texts), flush=True)
        found.sort(key=lambda row: list(ROWS).index(row["row"]))
        write(args, found, list(texts))


def once(model: Any) -> None:
    """Let all rows share what the text says about the original model, which takes longer than to fit a row to it."""
    known: dict[int, Any] = {}
    plain = absorb.moments

    def moments(_: Any, plan: Plan, ids: torch.Tensor, keep: bool = False) -> Any:
        if ids.shape[1] not in known:
            known[ids.shape[1]] = plain(model, plan, ids)
        return known[ids.shape[1]]

    absorb.moments = moments


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an earlier run with the same settings, which are not measured again."""
    path = Path(f"{args.out}.json")
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    same = all(before.get(name) == getattr(args, name) for name in ("context", "tokens", "windows"))
    rows: list[dict[str, Any]] = before["rows"] if same else []
    return rows


def read(texts: list[str], tokenizer: Any) -> dict[str, torch.Tensor]:
    """name -> token ids `[n]`."""
    lines = sentences()
    found = {"builtin": " ".join(lines[len(lines) // 2 :])}
    found |= {name: Path(path).read_text(encoding="utf-8") for name, _, path in (x.partition("=") for x in texts)}
    return {name: tokenizer(text, return_tensors="pt")["input_ids"][0] for name, text in found.items()}


def per_token(model: Any) -> int:
    """Bytes of the cache for one more token of one sequence."""
    plan = model.kvcompile.plan
    return sum(b.bytes - a.bytes for a, b in zip(plan.bytes(1, 1000), plan.bytes(1, 1001), strict=True))


def write(args: argparse.Namespace, rows: list[dict[str, Any]], texts: list[str]) -> None:
    """The results so far."""
    facts = {"context": args.context, "tokens": args.tokens, "windows": args.windows, "torch": torch.__version__}
    Path(f"{args.out}.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    table = [
        [r["row"], r["bytes_per_token"], f"{r['bytes_per_token'] / rows[0]['bytes_per_token']:.0%}", r["parameters"]]
        + [f"{r[name]:.2f}" for name in texts]
        for r in rows
    ]
    head = ["row", "bytes a token", "of dense", "parameters", *texts]
    told = f"Perplexity of {args.tokens} tokens after {args.context}, {args.windows} windows; fp32, untrained."
    text = f"{told}\n\n{tabulate(table, head, tablefmt='github', disable_numparse=True)}\n"
    Path(f"{args.out}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
