"""Compaction after a selection: torch and the generated C++ kernel in turns in one process.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/compact.py --out benchmarks/results/compact

keep: all that dropping entries takes, page tables and the first touch of new memory included (which varies: huge
pages). move: the compactor alone, between arrays that are there (for pages too: into the same pages). Milliseconds for
one layer and sequence, medians; faster: torch over C++, the median of the ratios by round. extra: what a compactor
allocates at its peak beside source and target.
int4: kivi, keys 32 tokens a scale (whole groups stay), values 32 channels a scale.
Nothing is printed unless both leave the very same bytes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kvcompile.kernels.compact import Compactor
from kvcompile.kernels.cpp import build
from kvcompile.kernels.dispatch import CPP, SDPA
from kvcompile.plan.storage import Codec
from kvcompile.runtime.cache import HEADROOM
from kvcompile.stores import factory
from kvcompile.stores.dense import DenseStore
from kvcompile.stores.encoded.codes import Codes, Format, RaggedCodes
from kvcompile.stores.encoded.paged import PagedCodes
from kvcompile.stores.paged import PagedStore
from kvcompile.stores.ragged import RaggedStore

SHAPES = {"8x128": (8, 128), "3x64": (3, 64)}
PAGE, GROUP = 32, 32
INT4 = Codec("int4", "channel", GROUP), Codec("int4", "token", 32)
WAYS = ("dense - dense", "dense - ragged", "paged in place")
CASES = [(kind, way) for kind in ("float32", "bfloat16") for way in WAYS]
CASES += [("int4", "ragged - ragged"), ("int4", "paged in place")]
COMPACTORS = {"torch": SDPA.compact, "C++": CPP.compact}
Store = DenseStore | RaggedStore | PagedStore | RaggedCodes | PagedCodes


def filler(kind: str, way: str, heads: int, dim: int, tokens: int) -> Callable[[], Store]:
    """What makes a store with one sequence of `tokens` tokens, always the same ones."""
    keys, values = torch.randn(2, 1, heads, tokens, dim)
    at, page = torch.arange(tokens).unsqueeze(0), PAGE if way == "paged in place" else 0
    if kind != "int4":
        keys, values = (x.to(getattr(torch, kind)) for x in (keys, values))

        def plain_store() -> Store:
            store = PagedStore.empty(keys, values, page) if page else factory.contiguous(keys, values, None, HEADROOM)
            return store.append(keys, values, at, HEADROOM)

        return plain_store
    format = Format(*INT4, torch.float32)
    codes = Codes.of(keys.flatten(0, 2), values.flatten(0, 2), at.int().expand(heads, -1).flatten(), format)

    def body() -> Store:
        made: Store = RaggedCodes(codes, format, 1, heads, [tokens] * heads)
        if page:
            made = PagedCodes.like(codes, format, 1, heads, page)
        made.append([tokens] * heads, codes, HEADROOM)
        return made

    return body


def chosen(kind: str, way: str, heads: int, tokens: int, share: float) -> list[Tensor]:
    """Which entries of each row stay, at random: of int4 whole groups, of ragged rows one more from head to head."""
    unit = GROUP if kind == "int4" else 1
    count, more = int(tokens // unit * share), way.endswith("ragged")
    groups = [torch.randperm(tokens // unit)[: count + more * h].sort().values for h in range(heads)]
    return [(g.unsqueeze(1) * unit + torch.arange(unit)).flatten() for g in groups]


def kept(store: Store, indices: list[Tensor], move: Compactor) -> Store:
    """What the selection leaves."""
    return store.keep(indices, HEADROOM, move)


def contents(store: Store) -> list[Tensor]:
    """All that the rows hold, as bytes."""
    lengths = store.lengths
    held, rows = store.arrays(), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    entries = torch.cat([torch.arange(n) for n in lengths])
    found = []
    for x, n, sharing in zip(held.flat(), held.shared, held.sharing(len(lengths)), strict=True):
        found.append(x[held.slots(rows, entries, sharing)[::n] // n].contiguous().view(torch.uint8))
    return found


def extra(call: Callable[[], object]) -> int:
    """Bytes that torch allocates at the peak of a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    total = peak = 0
    for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def milliseconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def race(kind: str, way: str, shape: str, tokens: int, share: float, rounds: int) -> dict[str, object]:
    """One row of the table."""
    heads, dim = SHAPES[shape]
    fill = filler(kind, way, heads, dim, tokens)
    indices = chosen(kind, way, heads, tokens, share)
    paged, whole = way == "paged in place", fill()
    left = {name: kept(fill(), indices, move) for name, move in COMPACTORS.items()}
    if any(not torch.equal(a, b) for a, b in zip(*map(contents, left.values()), strict=True)):
        sys.exit(f"they differ at {kind}, {way}, {shape}, {tokens} tokens: nothing was timed")
    entries, counts = torch.cat(indices), [len(i) for i in indices]
    source = whole.arrays()
    target = source if paged else left["C++"].arrays()
    calls = {name: (lambda move=move: move(source, target, entries, counts)) for name, move in COMPACTORS.items()}
    del left
    taken: dict[tuple[str, str], list[float]] = {}
    for round_ in range(rounds):
        for name in sorted(COMPACTORS, reverse=round_ % 2 == 0):
            store = fill() if paged else whole  # what is compacted in place is gone afterwards
            taken.setdefault(("keep", name), []).append(
                milliseconds(lambda s=store, n=name: kept(s, indices, COMPACTORS[n]))
            )  # type: ignore[misc]
            del store
            taken.setdefault(("move", name), []).append(milliseconds(calls[name]))
    row: dict[str, object] = {"numbers": kind, "rows": way, "heads x dim": shape, "entries": tokens}
    row["kept"] = f"{share:.0%}"
    for what in ("keep", "move"):
        both = [taken[what, name] for name in COMPACTORS]
        row |= {f"{what}: {name}": f"{statistics.median(t):.2f}" for name, t in zip(COMPACTORS, both, strict=True)}
        row[f"{what}: faster"] = f"{statistics.median(a / b for a, b in zip(*both, strict=True)):.2f}"
    return row | {f"extra MB: {name}": f"{extra(calls[name]) / 1e6:.2f}" for name in COMPACTORS}


@torch.inference_mode()
def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--entries", nargs="+", type=int, default=[256, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out")
    parser.add_argument("--append", action="store_true", help="add to the file")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        race(kind, way, shape, tokens, share, args.rounds)
        for shape in args.shapes
        for tokens in args.entries
        for kind, way in CASES
        for share in (0.2, 0.5)
    ]
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    head = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads"
    head += f", torch {torch.__version__}, {build.describe()}; one sequence, pages of {PAGE}"
    print(f"{head}\n\n{text}")
    if args.out:
        command = f"    OMP_WAIT_POLICY=PASSIVE python {' '.join(sys.argv)}"
        with Path(args.out + ".md").open("a" if args.append else "w", encoding="utf-8") as file:
            file.write(f"{head}\n\n{command}\n\n{text}\n" + "\n" * (not args.append))


if __name__ == "__main__":
    main()
