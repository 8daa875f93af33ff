"""Why a recall misses what it misses: its own choice beside perfect ones of as many tokens, the question hidden.

    python benchmarks/recall_oracle.py --stacks benchmarks/stacks/recall.txt --rows clusterkv --half b --out NAME

own: as the stack chooses. groups: the groups that hold the most attention, summed over the query heads: as good as
these groups get. tokens: the tokens of the most attention, wherever they lie: as good as this budget gets, for as many
tokens in every head. The bytes read are the same, an index that a perfect choice would not need included. Prompts and
halves as in `recall_quality.py`, the question token by token.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from equal_bytes import DENSE, Row
from haystacks import add_arguments, command, files, haystacks
from recall_quality import answers, rows_of, said
from tabulate import tabulate
from torch import Tensor

from kvcompile.config.compose import compose
from kvcompile.evaluation.needle import NeedleTask
from kvcompile.graph import ops
from kvcompile.kernels.choose import EntryTable, chosen_lengths, listed, taken
from kvcompile.models.loading import load

CHOICES = ("own", "groups", "tokens")


class Perfect(fx.Interpreter):
    """Runs a graph whose layers read, of their groups, as many tokens as they would, but the best ones."""

    def __init__(self, graph: fx.GraphModule, choice: str) -> None:
        super().__init__(graph)
        self.choice = choice

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The node's result."""
        chosen = super().call_function(target, args, kwargs)
        if target is not ops.recall or chosen is None:
            return chosen
        queries, kv, step, _ = args
        return best(kv, torch.unflatten(queries[:, :, -1], 1, (kv.held.heads, -1)).flatten(0, 1), step, self.choice)


def best(kv: Any, queries: Tensor, step: Any, choice: str) -> EntryTable:
    """The entries that rows read by a perfect choice for `queries [R, g, D]`."""
    index, lengths = kv.index, kv.held.lengths
    wanted, table, mass = index.wanted(step.cache.seen, kv.held.heads), index.table, []
    for query, (keys, _, _) in zip(queries.float(), kv.held.rows(), strict=True):
        logits = query @ keys.float().mT * query.shape[-1] ** -0.5
        mass.append(logits.softmax(-1).sum(0))
    if choice == "groups":
        sums = torch.full(table.sizes.shape, float("-inf"), dtype=torch.float32, device=queries.device)
        for r, row in enumerate(mass):
            for g in range(index.counts[r]):
                start, size = int(table.starts[r, g]), int(table.sizes[r, g])
                sums[r, g] = row[start : start + size].mean()
        numbers = torch.tensor([wanted, lengths, table.ends], dtype=torch.int64, device=queries.device)
        took = taken(sums, table.sizes, numbers[0])
        return listed(table, took, numbers, chosen_lengths(table, wanted, lengths))
    rows = []
    for row, count, end in zip(mass, wanted, table.ends, strict=True):
        always = torch.arange(row.shape[0], dtype=torch.int64, device=row.device)
        most = row[table.first : end].topk(count).indices.sort().values + table.first
        rows.append(torch.cat((always[: table.first], most, always[end:])))
    return EntryTable.of(rows, queries.device)


@contextmanager
def choosing(row: Row, choice: str) -> Any:
    """The row's model with another choice."""
    runtime = row.runner.model.kvcompile
    graph = runtime.graph
    if choice != "own":
        runtime.graph = Perfect(graph, choice).run
    try:
        yield
    finally:
        runtime.graph = graph


@torch.inference_mode()
def asked(rows: list[Row], task: NeedleTask, tokenizer: Any) -> dict[tuple[str, str], str]:
    """A mark for each prompt, by row and choice."""
    marks: dict[tuple[str, str], str] = {}
    for number, prompt in enumerate(task.prompts(tokenizer)):
        context, question = prompt.ids[: prompt.context], prompt.ids[prompt.context :]
        for row in rows:
            for choice in CHOICES if row.label != DENSE else CHOICES[:1]:
                with choosing(row, choice):
                    spoken = said(row, row.runner.cache(context), [[token] for token in question], task.max_new_tokens)
                right = prompt.answer in re.findall(r"\d+", tokenizer.decode(spoken))
                marks[row.label, choice] = marks.get((row.label, choice), "") + str(int(right))
        print(f"{number + 1}/{task.samples}: {marks}", file=sys.stderr, flush=True)
    return marks


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", required=True)
    parser.add_argument("--rows", nargs="+", default=["clusterkv"])
    parser.add_argument("--shares", nargs="+", default=["1/8", "1/16"])
    parser.add_argument("--dtype", default="bfloat16")
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=6, help="prompts of each text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(replace(compose([]).model, dtype=args.dtype, device="cpu"))
    rows, marks = rows_of(args, model, tokenizer), {}
    texts = haystacks(args.wikitext, args.half)
    with files(texts) as sources:
        for name in texts:
            seed = "ab".index(args.half)
            task = NeedleTask(args.tokens, args.samples, form="magic", seed=seed, source=sources[name])
            for key, found in asked(rows, task, tokenizer).items():
                marks[key] = marks.get(key, "") + found
    lines = [
        [row.label, *(answers(marks[row.label, c]) if (row.label, c) in marks else "" for c in CHOICES)] for row in rows
    ]
    head = f"{time.strftime('%Y-%m-%d')}, {args.dtype}, {args.tokens} tokens, right answers % (95 %)"
    text = (
        f"{head}\n\n    {command()}\n\n"
        + tabulate(lines, ["row", *CHOICES], tablefmt="github", disable_numparse=True)
        + "\n"
    )
    Path(args.out + ".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
