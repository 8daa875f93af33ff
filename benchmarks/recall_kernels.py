"""One decode step of one layer that recalls, beside our dense kernel over all its entries, in turns.

    python benchmarks/recall_kernels.py --out benchmarks/results/recall_kernels

32 query heads, 8 KV heads, 128 channels, S entries a row. `clusters`: groups of 40 to 120 entries with a vector each;
`pages`: of 16 entries with the bounds of their keys. A step chooses groups by its query until `read` entries of each
row are met, and attends to these, 16 sinks and 64 recent entries. dense: the kernel that attends to all. faster: dense
over step. choosing: its share of the step. MB: what stands for the groups, and the keys and values that a step reads.

Before each step the dense kernel runs once, untimed or timed, so that nothing of what a step reads is left in the
caches of the processor. Medians over rounds of ratios and times. Nothing is printed unless the choice is the
reference's, but for rounding, and attention is that of float64.

With one thread (OMP_NUM_THREADS=1) times are CPU times, for a machine on which something else runs too.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
from tables import show
from torch import Tensor

from kvcompile.kernels import choose as by_torch
from kvcompile.kernels import reference
from kvcompile.kernels.choose import EntryTable, GroupTable
from kvcompile.kernels.cpp import build
from kvcompile.kernels.dispatch import CPP
from kvcompile.kernels.layout import Queries
from kvcompile.kernels.spec import KernelSpec
from kvcompile.plan.recall import Entries
from kvcompile.policies.quest import Pages
from kvcompile.stores import hugepages
from kvcompile.stores.dense import DenseStore

HEADS, KV_HEADS, DIM = 32, 8, 128
SINKS, RECENT, PAGE, CLUSTERS = 16, 64, 16, (40, 121)
TOLERANCE = {"float32": 3e-6, "bfloat16": 2.5e-3}  # relative RMS: as in tests/kernels/cpp/test_attention.py


@dataclass(frozen=True)
class Layer:
    """A layer's rows, groups of their entries, and a query for each round."""

    store: DenseStore
    table: GroupTable
    queries: list[Tensor]
    read: int

    @property
    def dtype(self) -> torch.dtype:
        """Of all of it."""
        return self.store.keys.dtype

    def spec(self, chosen: bool) -> KernelSpec:
        """The attention kernel."""
        parts = self.store.chosen_parts if chosen else self.store.parts
        return KernelSpec(parts, HEADS // KV_HEADS, DIM, DIM, DIM**-0.5)

    def asked(self, turn: int) -> Queries:
        """The query of a round."""
        return Queries(self.queries[turn % len(self.queries)], torch.tensor([[self.store.length]]))

    def choose(self, turn: int, choose: Any = CPP.choose) -> EntryTable:
        """What a step reads."""
        rows = self.queries[turn % len(self.queries)].view(KV_HEADS, -1, DIM)
        return choose(rows, self.table, [self.read] * KV_HEADS, self.store.lengths, "mean", 1, self.store.places)


def stored(tokens: int, dtype: torch.dtype) -> DenseStore:
    """Rows of normal numbers."""
    like = torch.empty(0, dtype=dtype)
    store = DenseStore.empty(like.view(1, KV_HEADS, 0, DIM), like.view(1, KV_HEADS, 0, DIM), tokens)
    for x in (store.keys, store.values):
        x.normal_()
    store.positions[:] = torch.arange(tokens, dtype=torch.int32)
    store.length = tokens
    return store


def grouped(store: DenseStore, kind: str) -> GroupTable:
    """The groups of a store."""
    count = (store.length - SINKS - RECENT) // PAGE * PAGE
    keys = store.keys[0, :, SINKS : SINKS + count]
    if kind == "pages":
        groups = Pages(PAGE).divide(Entries(keys))
        representatives, sizes = groups.representatives, groups.sizes.int()
    else:
        drawn = torch.randint(*CLUSTERS, (count // CLUSTERS[0],))
        borders = drawn.cumsum(0)[drawn.cumsum(0) < count - CLUSTERS[0]].tolist()
        spans = list(zip([0, *borders], [*borders, count], strict=True))
        representatives = torch.stack([keys[:, a:b].float().mean(1).to(keys.dtype) for a, b in spans], 1)
        sizes = torch.tensor([b - a for a, b in spans], dtype=torch.int32).expand(KV_HEADS, -1).contiguous()
    held = hugepages.empty(representatives, *representatives.shape).copy_(representatives)
    starts = SINKS + sizes.cumsum(1, dtype=torch.int32) - sizes
    return GroupTable(held, starts, sizes, [SINKS + count] * KV_HEADS, SINKS)


def agree(layer: Layer) -> None:
    """Exits where a choice or attention to it is wrong."""
    chosen, expected = layer.choose(0), layer.choose(0, by_torch.choose)
    scores = by_torch.scores(layer.queries[0].view(KV_HEADS, -1, DIM).double(), layer.table, "mean")
    by_entry = torch.zeros(KV_HEADS, layer.store.length, dtype=torch.float64)
    for row, (starts, sizes) in enumerate(zip(layer.table.starts.tolist(), layer.table.sizes, strict=True)):
        by_entry[row, starts[0] : layer.table.ends[row]] = scores[row].double().repeat_interleave(sizes)
    for row, (mine, best) in enumerate(zip(chosen, expected, strict=True)):
        off = abs(float(by_entry[row, mine].sum() - by_entry[row, best].sum()))
        if len(mine.unique()) != len(best) or off > 1e-5 * float(by_entry[row, best].abs().sum()):
            sys.exit(f"row {row} chooses entries that score {off:.1e} less: nothing was timed")
    view, spec = layer.store.view(chosen), layer.spec(True)
    got, exact = (f(layer.asked(0), view, spec).double() for f in (CPP.attend, reference.attend))
    wrong = float((got - exact).norm() / exact.norm())
    if not wrong < TOLERANCE[str(layer.dtype).removeprefix("torch.")]:
        sys.exit(f"{spec.name} is off by {wrong:.1e}: nothing was timed")


def measure(kind: str, tokens: int, layer: Layer, seconds: float) -> dict[str, Any]:
    """One row of the table."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    whole, part, dense = layer.spec(False), layer.spec(True), layer.store.view()
    taken: dict[str, list[float]] = {"dense": [], "choose": [], "step": []}
    until, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < until or turn < 12:
        turn += 1
        begin = clock()
        CPP.attend(layer.asked(turn), dense, whole)
        between = clock()
        chosen = layer.choose(turn)
        after = clock()
        CPP.attend(layer.asked(turn), layer.store.view(chosen), part)
        end = clock()
        for name, seconds_taken in zip(taken, (between - begin, after - between, end - between), strict=True):
            taken[name].append(seconds_taken)
    rounds = list(zip(*(x[2:] for x in taken.values()), strict=True))
    ms = {f"{name} ms": round(1000 * median(x[2:]), 3) for name, x in taken.items()}
    return {
        "groups": kind,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "S": tokens,
        "read": layer.read,
        **ms,
        "faster": round(median(dense / step for dense, _, step in rounds), 1),
        "choosing": f"{median(choose / step for _, choose, step in rounds):.0%}",
        "index MB": round(layer.table.representatives.nbytes / 1e6, 1),
        "read MB": round(layer.choose(0).entries.numel() * 2 * DIM * layer.dtype.itemsize / 1e6, 1),
    }


@torch.inference_mode()
def main() -> None:
    """Check, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--read", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(TOLERANCE))
    parser.add_argument("--groups", nargs="+", default=["clusters", "pages"], choices=["clusters", "pages"])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row of the table")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for dtype, tokens in product(args.dtypes, args.tokens):
        store = stored(tokens, getattr(torch, dtype))
        queries = [torch.randn(1, HEADS, 1, DIM).to(store.keys.dtype) for _ in range(8)]
        for kind, read in product(args.groups, args.read):
            layer = Layer(store, grouped(store, kind), queries, read)
            agree(layer)
            rows.append(measure(kind, tokens, layer, args.seconds))
            print(rows[-1], file=sys.stderr, flush=True)
    rows.sort(key=lambda row: (row["groups"], row["dtype"] != "float32", row["S"], row["read"]))
    show(args.out, rows, note=f"Kernels: {build.describe()}.")


if __name__ == "__main__":
    main()
