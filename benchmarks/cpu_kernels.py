"""Decode attention on this CPU: generated C++ by number format and layout, and the library's ways, in turns.

    python benchmarks/cpu_kernels.py --out benchmarks/results/cpu_kernels

One new token over S entries a row. MB: what the kernel reads; GB/s: MB over time; copy: that, relative to what a copy
of a large array moves (read and written), in turns with the others. ragged, paged, scores: time relative to dense
without scores, over as many bytes. Ragged rows hold S/2 to 3S/2 entries; paged: pages of 16 entries (of 32 where
32 share scales: pages hold whole groups) in the order of memory, as a prompt leaves them; scattered: those in random
order, as a pool that served for long may have them; large: pages of 128 in random order.
library: the fastest of PyTorch's ways over the same floats in the same memory, for codes over bfloat16. bf16: the
time of our kernel over dense bfloat16, relative to this one.
Every call reads another copy, of as many as make 128 MB: between two steps of a model its weights pass through the
caches of the processor, and nothing is left there of what it attends to. Medians over rounds, each in an order of its
own, and of those over passes of the whole table, as what else the machine does comes and goes. Nothing is printed
unless every kernel agrees with float64.
Threads that sleep between kernels (OMP_WAIT_POLICY=PASSIVE) wake too late for rows that take 0.1 ms: leave it unset.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from random import Random
from statistics import median, mode
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from kvcompile.kernels import codecs, reference, sdpa
from kvcompile.kernels.cpp import backend, build
from kvcompile.kernels.layout import DenseView, PagedView, Queries, RaggedView, View
from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.plan.storage import Codec, Storage
from kvcompile.stores import hugepages

PAGES = {"paged": 16, "scattered": 16, "large": 128}  # entries
FORMATS = {
    "float32": (Codec("float32"), Codec("float32")),
    "bfloat16": (Codec("bfloat16"), Codec("bfloat16")),
    "int8": (Codec("int8", "token"), Codec("int8", "token")),
    "int4": (Codec("int4", "channel", 32), Codec("int4", "token", 32)),
    "nf4": (Codec("nf4", "token", 64), Codec("nf4", "token", 64)),
    "int2": (Codec("int2", "channel", 32), Codec("int2", "token", 32)),
}
SHAPES = {"32/8x128": (32, 8, 128), "9/3x64": (9, 3, 64)}
MOST_BYTES = 2.5e9
LAYOUTS = ("dense", "ragged", *PAGES)
GROUP = 32  # of tokens that share scales
COLD = 1 << 27  # bytes
TOLERANCE = {"float32": 3e-6, "bfloat16": 2.5e-3}  # relative RMS: as in tests/kernels/cpp/test_attention.py
WHOLE = 4e-4  # of whole numbers
DIGITS = {"ms": 3, "library ms": 3, "GB/s": 1, "copy GB/s": 1}


def stored(name: str, rows: int, tokens: int, dim: int) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """Codes and scales `[rows, tokens, ...]` of keys and values; every row holds the same numbers in its own memory."""
    made = []
    for codec in FORMATS[name]:
        codes, scales = codecs.encode(torch.randn(tokens, dim), codec)
        made.append(tuple(x if x is None else hugepages.empty(x, rows, *x.shape).copy_(x) for x in (codes, scales)))
    return tuple(made)  # type: ignore[return-value]


def lengths_of(rows: int, tokens: int) -> list[int]:
    """As many entries as `rows` rows of `tokens`, from half as many to one and a half, in whole groups."""
    half = tokens // 2 // GROUP
    spread = [GROUP * (half + 2 * half * i // max(rows - 1, 1)) for i in range(rows)]
    spread[-1] += rows * tokens - sum(spread)
    return spread


def page_of(name: str, layout: str) -> int:
    """Entries of a page, in whole groups that share scales, as `policies/paged.py` makes them; 0: no pages."""
    block = Storage(*FORMATS[name]).block
    return -(-PAGES.get(layout, 0) // block) * block


def view(name: str, layout: str, batch: int, heads: int, tokens: int, dim: int) -> View:
    """Rows of one format in one layout."""
    rows = batch * heads
    (k, ks), (v, vs) = stored(name, rows, tokens, dim)
    at = torch.arange(tokens, dtype=torch.int32)
    if layout == "dense":
        apart = [x if x is None else x.unflatten(0, (batch, heads)) for x in (k, v, ks, vs)]
        return DenseView(apart[0], apart[1], at.expand(batch, 1, -1), apart[2], apart[3])  # type: ignore[arg-type]
    k, v, ks, vs = (x if x is None else x.flatten(0, 1) for x in (k, v, ks, vs))  # type: ignore[assignment]
    at, lengths = at.repeat(rows), lengths_of(rows, tokens)
    ends = torch.tensor(lengths).cumsum(0)
    begins = ends - torch.tensor(lengths)
    if layout == "ragged":
        return RaggedView(k, v, at, begins.tolist(), lengths, batch, heads, begins, ends, ks, vs)
    page = page_of(name, layout)
    count = rows * tokens // page
    pages = (torch.arange(count) if layout == "paged" else torch.randperm(count)).int().view(rows, -1)
    return PagedView(k, v, at, pages, [tokens] * rows, batch, heads, page, torch.full((rows,), tokens), ks, vs)


def spec(name: str, layout: str, shape: tuple[int, int, int], scores: bool = False) -> KernelSpec:
    """The kernel for it."""
    heads, kv_heads, dim = shape
    part = Part("paged" if layout in PAGES else layout, *FORMATS[name], page_of(name, layout))
    return KernelSpec((part,), heads // kv_heads, dim, dim, dim**-0.5, scores=scores)


def bytes_of(x: View) -> int:
    """Bytes of codes and scales."""
    held = (x.keys, x.values, x.key_scales, x.value_scales)  # type: ignore[union-attr]
    return sum(t.numel() * t.element_size() for t in held if t is not None)


def copies(name: str, layout: str, batch: int, heads: int, tokens: int, dim: int) -> tuple[list[View], int]:
    """As many views as the caches of the processor cannot hold, and the bytes of one."""
    views = [view(name, layout, batch, heads, tokens, dim)]
    size = bytes_of(views[0])
    views += [view(name, layout, batch, heads, tokens, dim) for _ in range(COLD // size)]  # one is beyond all caches
    return views, size


def kernels(
    name: str, shape: tuple[int, int, int], batch: int, tokens: int, layouts: tuple[str, ...] = LAYOUTS
) -> dict[str, tuple[Callable, int]]:
    """A call and the bytes it reads, by layout (and dense with scores)."""
    heads, kv_heads, dim = shape
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    queries = Queries(torch.randn(batch, heads, 1, dim).to(dtype), torch.full((batch, 1), tokens))
    found: dict[str, tuple[Callable, int]] = {}
    for layout in layouts:
        views, size = copies(name, layout, batch, kv_heads, tokens, dim)
        one, turn = spec(name, layout, shape), cycle(views)
        found[layout] = (lambda s=one, t=turn: backend.attend(queries, next(t), s)), size
        if layout == "dense":
            sums = torch.zeros(batch * kv_heads, tokens)
            one = spec(name, layout, shape, True)
            found["scores"] = (lambda s=one, t=turn, to=sums: backend.attend(queries, next(t), s, to)), size
    return found


def library(name: str, shape: tuple[int, int, int], batch: int, tokens: int) -> dict[str, Callable]:
    """PyTorch's ways to attend to dense floats; for codes, to bfloat16."""
    heads, kv_heads, dim = shape
    name = name if name in ("float32", "bfloat16") else "bfloat16"
    views, _ = copies(name, "dense", batch, kv_heads, tokens, dim)
    turn = cycle(views)
    q = torch.randn(batch, heads, 1, dim).to(views[0].keys.dtype)
    queries, one, group = Queries(q, torch.full((batch, 1), tokens)), spec(name, "dense", shape), heads // kv_heads

    def enable_gqa() -> Tensor:
        held = next(turn)
        return F.scaled_dot_product_attention(q, held.keys, held.values, enable_gqa=True)

    def matmul() -> Tensor:
        held = next(turn)
        rows = q.view(batch, kv_heads, group, dim)
        weights = (rows @ held.keys.transpose(-1, -2) * dim**-0.5).softmax(-1)
        return weights @ held.values

    return {
        "sdpa, group as rows": lambda: sdpa.attend(queries, next(turn), one),
        "sdpa, enable_gqa": enable_gqa,
        "matmul, softmax, matmul": matmul,
    }


def agree(shapes: list[str], formats: list[str]) -> None:
    """Every kernel that is timed, on rows short enough for float64. Exits where one is wrong."""
    for shape in map(SHAPES.__getitem__, shapes):
        heads, kv_heads, dim = shape
        for name in formats:
            dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
            for layout in LAYOUTS:
                held = view(name, layout, 2, kv_heads, 640, dim)
                queries = Queries(torch.randn(2, heads, 1, dim).to(dtype), torch.full((2, 1), 2000))
                one = spec(name, layout, shape, layout == "dense")
                sums = [torch.zeros(2 * kv_heads, 2000) if one.scores else None for _ in range(2)]
                got = backend.attend(queries, held, one, sums[0]).double()
                expected = reference.attend(queries, held, one, sums[1]).double()
                wrong = float((got - expected).norm() / expected.norm())
                if one.scores:
                    wrong = max(wrong, float((sums[0] - sums[1]).norm() / sums[1].norm()))  # type: ignore
                if not wrong < TOLERANCE.get(name, WHOLE):
                    sys.exit(f"{one.name} is off by {wrong:.1e}: nothing was timed")


Times = dict[str, dict[int, float]]  # seconds of each contestant, by round


def turns(calls: dict[str, Callable], seconds: float) -> Times:
    """All in turns for about so long; who takes very long sits out some rounds."""
    taken: Times = {name: {} for name in calls}
    until, round_, order = time.perf_counter() + seconds, 0, Random(0)
    while time.perf_counter() < until or round_ < 3:
        for name, call in order.sample(list(calls.items()), len(calls)):  # to come after a copy costs more than others
            if round_ > 2 and sum(taken[name].values()) > seconds / len(calls):
                continue
            call()  # on another copy: what it runs is at hand again, whoever came before
            start = time.perf_counter()
            call()
            taken[name][round_] = time.perf_counter() - start
        round_ += 1
    return taken


def ratio(times: Times, one: str, other: str) -> float:
    """The median over the rounds of one time to another."""
    a, b = times[one], times[other]
    return median(a[r] / b[r] for r in a.keys() & b.keys())


def measure(shape: str, batch: int, tokens: int, name: str, seconds: float) -> dict[str, Any]:
    """One row of the table, in one pass."""
    calls = kernels(name, SHAPES[shape], batch, tokens)
    ways = library(name, SHAPES[shape], batch, tokens)
    source, target = torch.ones(COLD // 4), torch.empty(COLD // 4)
    copy = {"copy": lambda: target.copy_(source)}
    plain = {"bfloat16": kernels("bfloat16", SHAPES[shape], batch, tokens, ("dense",))["dense"][0]}
    times = turns({**{k: c for k, (c, _) in calls.items()}, **plain, **ways, **copy}, seconds)
    typical = {name: median(mine.values()) for name, mine in times.items()}
    size, fastest = calls["dense"][1], min(ways, key=lambda way: typical[way])
    moved = 2 * source.nbytes
    return {
        "heads": shape,
        "batch": batch,
        "S": tokens,
        "format": name,
        "MB": round(size / 1e6, 1),
        "ms": 1000 * typical["dense"],
        "GB/s": size / typical["dense"] / 1e9,
        "copy GB/s": moved / typical["copy"] / 1e9,
        "copy": size / moved * ratio(times, "copy", "dense"),
        "library ms": 1000 * typical[fastest],
        "library": fastest,
        "faster": ratio(times, fastest, "dense"),
        "bf16": ratio(times, "bfloat16", "dense"),
        **{other: ratio(times, other, "dense") for other in ("ragged", *PAGES, "scores")},
    }


Cell = tuple[str, int, int, str]  # shape, batch, entries a row, format


def bytes_in(cell: Cell) -> int:
    """Bytes of codes and scales."""
    shape, batch, tokens, name = cell
    _, kv_heads, dim = SHAPES[shape]
    return sum(c.nbytes(batch * kv_heads * tokens, dim) for c in FORMATS[name])


def over(passes: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table: the median of what each pass measured."""
    row = {}
    for name, first in passes[0].items():
        given = [one[name] for one in passes]
        row[name] = median(given) if isinstance(first, float) else mode(given)
        if isinstance(first, float):
            row[name] = f"{row[name]:.0%}" if name == "copy" else round(row[name], DIGITS.get(name, 2))
    return row


def processor() -> str:
    """Name of this CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def main() -> None:
    """Parse, check, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row of the table, each pass")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.manual_seed(0)
    agree(args.shapes, args.formats)
    cells: dict[Cell, list[dict[str, Any]]] = {
        cell: []
        for cell in product(args.shapes, args.batches, args.tokens, args.formats)
        if bytes_in(cell) < MOST_BYTES
    }
    for _, (cell, passes) in product(range(args.passes), cells.items()):
        passes.append(measure(*cell, args.seconds))
        print(passes[-1], file=sys.stderr, flush=True)
    text = tabulate([over(passes) for passes in cells.values()], headers="keys", tablefmt="github")
    print(text)
    if args.out:
        head = (
            f"{time.strftime('%Y-%m-%d')}, {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        )
        command = f"    python {' '.join(sys.argv)}"
        copy = f"Kernels: {build.describe()}."
        Path(args.out + ".md").write_text(f"{head}\n\n{command}\n\n{copy}\n\n{text}\n")


if __name__ == "__main__":
    main()
