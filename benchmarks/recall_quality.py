"""What each stack still answers at equal bytes read, the question hidden while the cache is made.

    python benchmarks/recall_quality.py --stacks benchmarks/stacks/recall.txt --half b --wikitext FILE --out NAME

Two haystacks: the documentation that ships with Python, and the text of WikiText-2 where `--wikitext` (or the
environment's KVCOMPILE_WIKITEXT) says where it lies; without it that half of the table is left out. Settings are chosen
on the first half of each text and seed 0 (`--half a`) and stated on the second half and seed 1 (`--half b`).

turn: the text alone is read, as one prompt; the cache is compressed or indexed; then the question comes in one piece,
as the next turn of a chat, and the answer is generated greedily. A recall that acts on decode steps alone reads
everything in a prompt, once for all tokens of the question; an eviction chooses again, among what it has kept.
hidden: the same, but the question comes token by token, each as a decode step: the question, too, is read over the
part. ClusterKV's own evaluation feeds questions so.
seen: text and question are one prompt but for its last token, which is the first step.

Every token of an answer is so predicted by a step over the stack's own cache, run by the stack's own graph. Perplexity:
of tokens that follow a context of the same length, step by step. Bytes are measured on the live caches, at the first
step of a hidden question: held on the device (index included), held in host memory, read by the step; shares are of the
uncompressed cache in the same dtype. The results of a text go to OUT-TEXT.json as they come: the same command goes on
where it ended, and two that differ in `--texts` alone may run side by side; the table is of what both have written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from equal_bytes import DENSE, Planner, Row, rows, stacks
from haystacks import add_arguments, command, files, haystacks
from tabulate import tabulate

from kvcompile.analysis.compare.contest import Contest
from kvcompile.config.compose import compose
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.intervals import ratio, wilson
from kvcompile.evaluation.needle import NeedlePrompt, NeedleTask
from kvcompile.evaluation.perplexity import spread
from kvcompile.models.loading import load
from kvcompile.runtime.cache import KVCache

SETTINGS = ("turn", "hidden", "seen")
Record = dict[str, Any]


@dataclass
class Book:
    """What has been measured on one text, by row: written down after each prompt, and read again by the next run."""

    path: Path
    rows: dict[str, Record]

    @classmethod
    def at(cls, path: Path) -> Book:
        """What the file holds, if there is one."""
        return cls(path, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})

    def of(self, row: Row) -> Record:
        """The record of a row. Raises KvcompileError where it was measured with other settings."""
        stack = " ".join(row.overrides)
        record = self.rows.setdefault(row.label, {"stack": stack, "losses": [], "bytes": []})
        for setting in SETTINGS:
            record.setdefault(setting, "")
        if record["stack"] != stack:
            raise KvcompileError(f"{row.label}: one file, one setting", record["stack"], "another --out")
        return record

    def save(self) -> None:
        """Write it down."""
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")


@torch.inference_mode()
def said(row: Row, cache: KVCache, pieces: Sequence[Sequence[int]], count: int) -> list[int]:
    """Feed the tokens piece by piece, then generate `count` tokens greedily."""
    logits = [row.runner.step(cache, *piece) for piece in pieces][-1]
    answer = [int(logits.argmax())]
    while len(answer) < count:
        answer.append(int(row.runner.step(cache, answer[-1]).argmax()))
    return answer


def measured(row: Row, cache: KVCache, token: int) -> dict[str, int]:
    """Bytes that a cache holds, and those that the step of one more token reads of it."""
    host = sum(layer.host_bytes_held() for layer in cache.layers)
    device, cache.reads = cache.nbytes() + cache.index_bytes() - host, {}
    row.runner.step(cache, token)
    read, cache.reads = sum(cache.reads.values()), None
    return {"device": device, "host": host, "read": read}


@dataclass
class Bench:
    """Everything that is measured of the rows, on one text."""

    tokenizer: Any
    rows: list[Row]
    task: NeedleTask
    book: Book

    def needles(self, settings: Sequence[str]) -> None:
        """Every prompt, hidden and seen, through every row that has not seen it."""
        for number, prompt in enumerate(self.task.prompts(self.tokenizer)):
            for setting in settings:
                for row in self.rows:
                    if len(self.book.of(row)[setting]) == number:
                        self.ask(row, setting, prompt)
            self.book.save()
            print(f"{self.book.path.stem} {number + 1}/{self.task.samples}", file=sys.stderr, flush=True)

    @torch.inference_mode()
    def ask(self, row: Row, setting: str, prompt: NeedlePrompt) -> None:
        """One answer, and whether its number is the right one."""
        record, read = self.book.of(row), len(prompt.ids) - 1 if setting == "seen" else prompt.context
        cache, question = row.runner.cache(prompt.ids[:read], prompt.context), prompt.ids[read:]
        if setting == "hidden":
            record["bytes"].append(measured(row, cache, question[0]))
            question = question[1:]
        pieces = [question] if setting == "turn" else [[token] for token in question]
        text = self.tokenizer.decode(said(row, cache, pieces, self.task.max_new_tokens))
        record[setting] += str(int(prompt.answer in re.findall(r"\d+", text)))

    def perplexity(self, text: list[str], windows: int, tokens: int) -> None:
        """Mean loss of each window through every row that has not read it."""
        ids = torch.tensor(self.tokenizer(" ".join(text))["input_ids"])
        for number, window in enumerate(spread(ids, self.task.tokens, tokens, windows).tolist()):
            for row in self.rows:
                if len(losses := self.book.of(row)["losses"]) == number:
                    losses.append(round(self.loss(row, window), 4))
            self.book.save()
            print(f"{self.book.path.stem} perplexity {number + 1}/{windows}", file=sys.stderr, flush=True)

    @torch.inference_mode()
    def loss(self, row: Row, window: Sequence[int]) -> float:
        """Mean negative log-likelihood in nats of what follows a context and one more token, read step by step."""
        cache, rest, total = row.runner.cache(window[: self.task.tokens]), window[self.task.tokens :], 0.0
        for token, target in itertools.pairwise(rest):
            total -= float(row.runner.step(cache, token).float().log_softmax(-1)[target])
        return total / (len(rest) - 1)


def answers(marks: str) -> str:
    """Share of right answers, and Wilson's interval."""
    right, count = marks.count("1"), len(marks)
    low, high = wilson(right, count)
    return f"{100 * right / count:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def cells(records: dict[str, Record], dense: dict[str, Record]) -> Record:
    """One line of the table, out of the records of a row and of the uncompressed model by text."""
    line: Record = {}
    for setting in SETTINGS:
        marks = {name: record[setting] for name, record in records.items() if record.get(setting)}
        line |= {f"{setting}, {name} %": f"{100 * m.count('1') / len(m):.0f}" for name, m in marks.items()}
        if marks:
            line[f"{setting} % (95 %)"] = answers("".join(marks.values()))
    pairs = []
    for name, record in records.items():
        if record["losses"]:
            line[f"perplexity, {name}"] = f"{math.exp(sum(record['losses']) / len(record['losses'])):.2f}"
            pairs += list(zip(record["losses"], dense[name]["losses"], strict=False))
    if pairs:
        line["x dense (95 %)"] = "{:.3f} ({:.3f}-{:.3f})".format(*ratio(*zip(*pairs, strict=True)))
    both = [pair for name, r in records.items() for pair in zip(r["bytes"], dense[name]["bytes"], strict=False)]
    for kind, of in (("device", "device"), ("host", "device"), ("read", "read")):
        share = sum(mine[kind] for mine, _ in both) / max(1, sum(whole[of] for _, whole in both))
        line[f"{kind} %"] = f"{100 * share:.2f}"
    return line


def table(labels: Sequence[str], books: dict[str, Book]) -> str:
    """All rows as Markdown, uncompressed first, with their stacks below."""
    rows = {label: {name: book.rows[label] for name, book in books.items() if label in book.rows} for label in labels}
    lines = [{"row": label, **cells(records, rows[DENSE])} for label, records in rows.items()]
    keys = list(dict.fromkeys(key for line in lines for key in line))
    body = [[line.get(key, "") for key in keys] for line in lines]
    known = {label: next(iter(records.values()))["stack"] for label, records in rows.items() if records}
    below = "\n".join(f"- {label}: `{stack or 'as it is'}`" for label, stack in known.items())
    return f"{tabulate(body, keys, tablefmt='github', disable_numparse=True)}\n\n{below}\n"


def rows_of(args: argparse.Namespace, model: Any, tokenizer: Any) -> list[Row]:
    """The rows that the command line asks for."""
    lines = Path(args.stacks).read_text(encoding="utf-8").splitlines()
    known = stacks(lines, [Fraction(share) for share in args.shares], args.rows)
    return rows(Contest(model, tokenizer), Planner(model.config, args.dtype, args.tokens), known)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", required=True)
    parser.add_argument("--rows", nargs="+", default=[""], help="only the rows whose label contains one of these")
    parser.add_argument(
        "--shares", nargs="+", default=["1/8", "1/16"], help="of the uncompressed bytes, read by a step"
    )
    parser.add_argument("--model", nargs="*", default=[], help="as on the command line: model=qwen2 model.pretrained=x")
    parser.add_argument("--dtype", default="bfloat16")
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--form", default="magic")
    parser.add_argument("--texts", nargs="+", choices=["python", "wikitext"], help="those that this run measures")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--windows", type=int, default=8, help="of perplexity, in each text")
    parser.add_argument("--scored", type=int, default=24, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, write JSON and Markdown."""
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(replace(compose(args.model).model, dtype=args.dtype, device="cpu"))
    task = NeedleTask(tokens=args.tokens, samples=args.samples, form=args.form, seed="ab".index(args.half))
    at_work, texts = rows_of(args, model, tokenizer), haystacks(args.wikitext, args.half)
    books = {name: Book.at(Path(f"{args.out}-{name}.json")) for name in texts}
    with files(texts) as sources:
        for name in args.texts or texts:
            bench = Bench(tokenizer, at_work, replace(task, source=sources[name]), books[name])
            bench.needles(args.settings)
            if args.windows:
                bench.perplexity(texts[name], args.windows, args.scored)
    books = {name: Book.at(book.path) for name, book in books.items()}  # another process may have written one
    head = f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, torch {torch.__version__}, "
    head += f"{args.dtype}, {args.tokens} tokens, {args.samples} prompts a cell\n\n    {command()}\n\n"
    text = head + table([row.label for row in at_work], books)
    Path(args.out + ".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
