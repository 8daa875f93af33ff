"""What stacks still answer at equal bytes held, where a question comes after the cache is made, and where it was seen.

    python benchmarks/asked_later.py --stacks benchmarks/stacks/asked_later.txt --half b --wikitext FILE --out NAME
    python benchmarks/asked_later.py ... --questions FILE.jsonl --tokens 2048

Contexts: needles in two texts (`haystacks.py`; settings are chosen on the first half of each and seed 0, `--half a`,
and stated on the second half and seed 1, `--half b`), and with `--questions` passages with questions in LongBench's
shape, of which a third is for settings. Every context is read once for all stacks that read it alike, and is asked all
of its questions, each of a copy of the cache (`fork`), so that the four of `four_keys` compete for room.

hidden: the cache is made of the context alone; a question then comes as the next turn of a chat, after which the stack
compresses again.
together: the same, but nothing is dropped between question and answer.
seen: the cache is made of context and question.

The right answer is forced token by token over the stack's own cache. right: every token of it is the likeliest, which
is what greedy decoding would say; beside it, how many of the answers stay that the uncompressed model gives. excess:
mean negative log-likelihood of the answer's tokens in nats, less that of the uncompressed model for the same question,
and its standard error over contexts. Of several right answers to a question, the likeliest. Perplexity: of the
`--scored` tokens after a context of the same length, as a multiple of the uncompressed model's.

Bytes are those held after the context, scales and true positions included, as a share of the uncompressed cache in
bfloat16, whatever the model runs in here; a stack's budget is the largest that fits a share (`equal_bytes.py`). With
`--rounds`, a prefill of each stack by itself, in turns: its time as a multiple of the uncompressed model's, and by how
much the memory of the process grows at most.

What is measured goes to OUT.jsonl as it comes: the same command goes on where it ended, and one with more rows, forms
or samples measures what is missing. Samples are taken in turns, so that `--minutes` leaves all cells about as full;
`--minutes 0` makes the tables of the contexts that are complete.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from cpu_kernels import processor
from equal_bytes import DENSE, Planner, Row, held, rows, stacks
from haystacks import add_arguments, command, files, haystacks
from tabulate import tabulate

from kvcompile.analysis.compare.contest import Contest
from kvcompile.analysis.compare.forced import Forced, continued, forced
from kvcompile.analysis.parts import Parts, fingerprint
from kvcompile.analysis.prompts import prompts
from kvcompile.config.compose import compose
from kvcompile.config.schema import PromptsConfig
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.intervals import ratio, standard_error, wilson
from kvcompile.evaluation.needle import NeedleTask
from kvcompile.evaluation.perplexity import spread
from kvcompile.evaluation.speed import compare
from kvcompile.models.loading import load

BYTES = "bfloat16"  # the cache that shares are of
SETTINGS = ("hidden", "together", "seen")
TEXT = "text"  # the form that asks nothing: what comes after a context
Tokens = tuple[int, ...]
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A context, the questions about it with their right answers, or the text that follows it."""

    text: str
    form: str
    context: Tokens
    questions: tuple[tuple[Tokens, tuple[Tokens, ...]], ...] = ()
    rest: Tokens = ()

    def readings(self, settings: Sequence[str]) -> Iterator[Reading]:
        """What must be read for it."""
        if self.rest:
            yield Reading(self, "hidden", self.context)
            return
        for setting in settings:
            if setting != "seen":
                yield Reading(self, setting, self.context, self.questions)
                continue
            for question, answers in self.questions:
                yield Reading(self, setting, self.context + question[:-1], ((question[-1:], answers),))


@dataclass(frozen=True)
class Reading:
    """What a cache is made of, and the questions that are asked of copies of it."""

    case: Case
    setting: str
    ids: Tokens
    questions: tuple[tuple[Tokens, tuple[Tokens, ...]], ...] = ()

    def of(self, row: Row) -> Record:
        """What a stack makes of it: bytes held, and `loss` or for each question `[exact, nll]`."""
        cache = row.runner.cache(self.ids, len(self.case.context))
        record: Record = {"held": held(row.runner.plan, cache, BYTES)}
        if self.case.rest:
            return record | {"loss": round(continued(row.runner, cache, self.case.rest), 5)}
        every = []
        for question, answers in self.questions:
            tried = [forced(row.runner, cache.fork(), question, a, self.setting != "hidden") for a in answers]
            every.append(_best(tried))
        return record | {"answers": every}


def _best(tried: Sequence[Forced]) -> list[float]:
    return [float(any(t.exact for t in tried)), round(min(t.nll for t in tried), 5)]


def needles(tokenizer: Any, text: str, task: NeedleTask) -> list[Case]:
    """The contexts of a task, each with all of its questions."""
    cases = []
    for group in task.groups(tokenizer):
        asked = [(tuple(p.ids[p.context :]), (_encoded(tokenizer, f" {p.answer}"),)) for p in group]
        cases.append(Case(text, task.form, tuple(group[0].ids[: group[0].context]), tuple(asked)))
    return cases


def passages(tokenizer: Any, args: argparse.Namespace) -> list[Case]:
    """Questions about passages, in the tokenizer's chat template: of the first third of the file, or of the others."""
    count = len(Path(args.questions).read_text(encoding="utf-8").splitlines())
    every, cases = prompts(tokenizer, PromptsConfig(args.questions, count, args.tokens, chat=True), args.tokens), []
    for p in (every[: count // 3] if args.half == "a" else every[count // 3 :])[: args.asked]:
        answers = tuple(_encoded(tokenizer, answer) for answer in p.answers)
        cases.append(Case("passages", "questions", p.ids[: p.context], ((p.ids[p.context :], answers),)))
    return cases


def texts(tokenizer: Any, name: str, sentences: list[str], args: argparse.Namespace) -> list[Case]:
    """Windows of a text, the last `args.scored` tokens of each scored."""
    ids = torch.tensor(tokenizer(" ".join(sentences))["input_ids"], dtype=torch.int64, device="cpu")
    windows = spread(ids, args.tokens, args.scored, args.windows).tolist()
    return [Case(name, TEXT, tuple(w[: args.tokens]), rest=tuple(w[args.tokens :])) for w in windows]


def _encoded(tokenizer: Any, text: str) -> Tokens:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def cases(args: argparse.Namespace, tokenizer: Any) -> list[Case]:
    """Everything that is read, the first sample of each cell first."""
    cells = [passages(tokenizer, args)] if args.questions else []
    halves = {name: text for name, text in haystacks(args.wikitext, args.half).items() if name in args.texts}
    with files(halves) as sources:
        for name, text in halves.items():
            for form, _, samples in (word.partition(":") for word in args.forms):
                task = NeedleTask(args.tokens, int(samples), seed="ab".index(args.half), form=form)
                cells.append(needles(tokenizer, name, replace(task, source=sources[name])))
            if args.windows:
                cells.append(texts(tokenizer, name, text, args))
    longest = max(map(len, cells))
    return [cell[i] for i in range(longest) for cell in cells if i < len(cell)]


def measure(args: argparse.Namespace, every: list[Case], at_work: list[Row], parts: Parts) -> list[Record]:
    """A record of each reading by each row, of all contexts that are read by all rows when the time is up."""
    records, end = [], time.monotonic() + 60 * args.minutes
    whole = replace(at_work[0].contest.dense, dtype=BYTES)
    for number, case in enumerate(every):
        wanted = [(reading, row, _unit(reading, row)) for reading in case.readings(args.settings) for row in at_work]
        if time.monotonic() >= end and not all(unit in parts for _, _, unit in wanted):
            continue
        for reading, row, unit in wanted:
            record = parts.of(unit, lambda row=row, reading=reading: reading.of(row))
            dense = sum(layer.dense_bytes for layer in whole.bytes(1, len(reading.ids)))
            where = {"row": row.label, "text": case.text, "form": case.form, "setting": reading.setting}
            records.append(record | where | {"case": number, "dense": dense})
        print(f"{number + 1}/{len(every)} {case.text} {case.form}", file=sys.stderr, flush=True)
    return records


def _unit(reading: Reading, row: Row) -> Record:
    """What a record depends on."""
    asked, setting = reading.questions or reading.case.rest, reading.setting
    return {"stack": row.overrides, "read": reading.ids, "asked": asked, "setting": setting}


def costs(args: argparse.Namespace, at_work: list[Row], case: Case, parts: Parts) -> Record:
    """By row, time of a prefill as a multiple of the uncompressed model's, and the most bytes that memory grows by."""
    ids, found = torch.tensor([case.context], dtype=torch.int64, device="cpu"), {}
    for row in at_work if args.rounds else []:

        def timed(row: Row = row) -> Record:
            both = compare({"dense": at_work[0].runner.model, "stack": row.runner.model}, ids, 1, args.rounds)
            return {"prefills": 1 / both.prefill_ratio["stack"], "peak": both.speeds["stack"].peak_bytes}

        unit = {"stack": row.overrides, "tokens": args.tokens, "rounds": args.rounds, "threads": args.threads}
        found[row.label] = parts.of(unit, timed)
        print(f"prefill of {row.label}: {found[row.label]}", file=sys.stderr, flush=True)
    return found


def line(label: str, records: list[Record], cost: Record) -> Record:
    """One line of a table, out of the records of all rows in one setting."""
    found: Record = {"row": label}
    mine = [r for r in records if r["row"] == label]
    full = {(r["case"], i): r for i, r in _numbered(records) if r["row"] == DENSE}
    if not mine:
        return found
    found["bytes"] = f"1/{sum(r['dense'] for r in mine) / sum(r['held'] for r in mine):.1f}"
    for form in dict.fromkeys(r["form"] for r in mine if "answers" in r):
        pairs = [(r, full[r["case"], i]) for i, r in _numbered(mine) if r["form"] == form]
        found |= _answers(form, pairs)
    losses = [(r["loss"], full[r["case"], i]["loss"]) for i, r in _numbered(mine) if "loss" in r]
    if losses:
        found["perplexity x (95 %)"] = "{:.3f} ({:.3f}-{:.3f})".format(*ratio(*zip(*losses, strict=True)))
    if label in cost:
        found |= {"prefills": f"{cost[label]['prefills']:.2f}", "peak MB": f"{cost[label]['peak'] / 1e6:.0f}"}
    return found


def _numbered(records: list[Record]) -> Iterator[tuple[int, Record]]:
    """Records with the number of their question among those of the row and case."""
    seen: dict[tuple[str, int], int] = {}
    for record in records:
        key = record["row"], record["case"]
        seen[key] = seen.get(key, -1) + 1
        yield seen[key], record


def _answers(form: str, pairs: Sequence[tuple[Record, Record]]) -> Record:
    both = [(a, b, r["case"]) for r, full in pairs for a, b in zip(r["answers"], full["answers"], strict=True)]
    right, count = int(sum(a[0] for a, _, _ in both)), len(both)
    low, high = wilson(right, count)
    stay, theirs = (int(sum(x)) for x in zip(*((a[0] * b[0], b[0]) for a, b, _ in both), strict=True))
    excess: dict[int, list[float]] = {}
    for (_, mine), (_, full), case in both:
        excess.setdefault(case, []).append(mine - full)
    middle, error = standard_error(list(excess.values()))
    return {
        f"{form} right % (95 %)": f"{100 * right / count:.0f} ({100 * low:.0f}-{100 * high:.0f})",
        f"{form}, of the uncompressed": f"{stay}/{theirs}",
        f"{form} excess": f"{middle:+.3f} ± {error:.3f}",
    }


def tables(labels: list[str], records: list[Record], cost: Record) -> str:
    """A table of all texts in each setting, and one of each text."""
    pieces = []
    for setting in dict.fromkeys(r["setting"] for r in records):
        of_setting = [r for r in records if r["setting"] == setting]
        names = list(dict.fromkeys(r["text"] for r in of_setting))
        for wanted in [names] + ([[name] for name in names] if len(names) > 1 else []):
            chosen = [r for r in of_setting if r["text"] in wanted]
            lines = [line(label, chosen, cost) for label in labels]
            keys = list(dict.fromkeys(key for entry in lines for key in entry))
            body = [[entry.get(key, "") for key in keys] for entry in lines]
            head = f"## The question {setting}: {' and '.join(wanted)}\n\n"
            pieces.append(head + tabulate(body, keys, tablefmt="github", disable_numparse=True))
    return "\n\n".join(pieces)


def write(args: argparse.Namespace, at_work: list[Row], records: list[Record], cost: Record) -> None:
    """OUT.md and OUT.json."""
    read = len({r["case"] for r in records})
    head = f"{time.strftime('%Y-%m-%d')}, {processor()}, torch {torch.__version__}, {args.dtype}, "
    head += f"{args.tokens} tokens, {read} contexts"
    stacks_below = "\n".join(f"- {row.label}: `{' '.join(row.overrides) or 'as it is'}`" for row in at_work)
    body = tables([row.label for row in at_work], records, cost)
    text = f"{head}\n\n    {command()}\n\n{body}\n\n{stacks_below}\n"
    Path(args.out + ".md").write_text(text, encoding="utf-8")
    by_row: Record = {row.label: {"stack": " ".join(row.overrides), "cost": cost.get(row.label)} for row in at_work}
    for r in records:
        cell = by_row[r["row"]].setdefault("/".join((r["text"], r["form"], r["setting"])), [])
        cell.append({key: r[key] for key in ("case", "held", "dense", "loss", "answers") if key in r})
    Path(args.out + ".json").write_text(json.dumps(by_row) + "\n", encoding="utf-8")
    print(text)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", required=True)
    parser.add_argument("--rows", nargs="+", default=[""], help="only the rows whose label contains one of these")
    parser.add_argument("--shares", nargs="+", default=["1/8", "1/16", "1/24", "1/32"], help="of the bfloat16 bytes")
    parser.add_argument("--model", nargs="*", default=[], help="as on the command line: model=qwen2 model.pretrained=x")
    parser.add_argument("--dtype", default="float32", help="in which the model runs")
    add_arguments(parser)
    parser.add_argument("--texts", nargs="*", choices=["python", "wikitext"], default=["python", "wikitext"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--forms", nargs="*", default=["magic:20", "four_keys:10", "passcode:20"], help="FORM:SAMPLES")
    parser.add_argument("--questions", help="a .jsonl file of passages with questions, in LongBench's shape")
    parser.add_argument("--asked", type=int, default=40, help="how many of them")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["hidden", "seen"])
    parser.add_argument("--windows", type=int, default=12, help="of perplexity, in each text")
    parser.add_argument("--scored", type=int, default=96, help="tokens of a window")
    parser.add_argument("--rounds", type=int, default=0, help="prefills of each stack by itself")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further context after so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, write JSON and Markdown."""
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(replace(compose(args.model).model, dtype=args.dtype, device="cpu"))
    every = cases(args, tokenizer)
    if not every:
        raise KvcompileError("something must be asked", "no text and no questions", "--texts, or --questions FILE")
    lines = Path(args.stacks).read_text(encoding="utf-8").splitlines()
    known = stacks(lines, [Fraction(share) for share in args.shares], args.rows)
    at_work = rows(Contest(model, tokenizer), Planner(model.config, BYTES, args.tokens, "held"), known)
    parts = Parts(Path(args.out + ".jsonl"), {"weights": fingerprint(model), "dtype": args.dtype})
    records = measure(args, every, at_work, parts)
    write(args, at_work, records, costs(args, at_work, every[0], parts))


if __name__ == "__main__":
    main()
