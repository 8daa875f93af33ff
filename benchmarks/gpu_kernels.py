"""Generated Triton kernels on a GPU: correct first, then tuned, then timed against the library and the memory.

    python benchmarks/gpu_kernels.py --tune --out benchmarks/results/gpu_kernels.md
    TRITON_INTERPRET=1 python benchmarks/gpu_kernels.py --gate      # the gate alone, on a CPU

Shapes of Llama 3 8B: 32 query heads, 8 KV heads, 128 channels; one new token. For each context, batch and storage:
bytes that must be read, achieved bytes a second, its share of the measured copy bandwidth; SDPA (K and V as they are,
and with the group folded) and FlexAttention on float16. Times are medians of CUDA events, caches flushed in between.
A table is written only where every kernel in it agreed with the float64 reference. `--tune` searches tile, warps,
stages and splits and writes the winners to kernels/triton/tuned.yaml under the device's name.
Nothing here has been measured yet: no GPU was available when it was written.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from tabulate import tabulate
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels import reference
from kvcompile.kernels.codecs import dtype_of, encode
from kvcompile.kernels.layout import DenseView, MixedView, PagedView, Queries, RaggedView, Segment, View, parts
from kvcompile.kernels.spec import KernelSpec, Part, plain
from kvcompile.kernels.triton import backend, tuning
from kvcompile.kernels.triton.launch import Call, attend, interpreted
from kvcompile.kernels.triton.tuning import TABLE, Choice
from kvcompile.plan.storage import Codec

HEADS, GROUP, DIM, PAGE, RESIDUAL = 8, 4, 128, 16, 128
KIVI = {bits: (Codec(f"int{bits}", "channel", 32), Codec(f"int{bits}", "token", 32)) for bits in (4, 2)}
PAGED = replace(plain("paged", "float16")[0], page=PAGE)
TAIL = plain("ragged", "float16")
STORES: dict[str, tuple[Part, ...]] = {
    "float16 dense": plain("dense", "float16"),
    "float16 ragged": TAIL,
    "float16 paged": (PAGED,),
    "float8 + tail": (Part("ragged", Codec("float8", "token"), Codec("float8", "token")), *TAIL),
    "int8 + tail": (Part("ragged", Codec("int8", "token"), Codec("int8", "token")), *TAIL),
    "int4 + tail": (Part("ragged", *KIVI[4]), *TAIL),
    "int4 paged + tail": (Part("paged", *KIVI[4], 32), *TAIL),
    "int2 + tail": (Part("ragged", *KIVI[2]), *TAIL),
}
TOLERANCE = 4e-3  # relative RMS: weights are rounded to float16 before they meet the values


def segment(part: Part, n: int, first: int, batch: int, device: str) -> Segment:
    """Random entries at positions `first ..`, encoded, in the part's layout; rows of ragged and paged ones differ."""
    rows = batch * HEADS
    uniform = part.layout == "dense"
    unit = max(part.page, *(c.group if c.axis == "channel" else 1 for c in (part.key, part.value)))
    room = -(-n // unit) * unit
    lengths = [n if uniform else n - (r % 4) * (n // 16) // unit * unit for r in range(rows)]
    made: list[Tensor | None] = []
    for codec in (part.key, part.value):
        x = torch.randn(rows * room, DIM, device=device)
        made += encode(x, codec) if codec.scaled else (x.to(dtype_of(codec)), None)
    keys, key_scales, values, value_scales = made
    assert keys is not None
    assert values is not None
    positions = (first + torch.arange(room, device=device, dtype=torch.int32)).repeat(rows)
    if uniform:

        def stacked(x: Tensor | None) -> Any:
            return None if x is None else x.view(batch, HEADS, -1, *x.shape[1:])[:, :, : n if x.shape[0] > 1 else None]

        return DenseView(*(stacked(x) for x in (keys, values, positions, key_scales, value_scales)))
    counts = torch.tensor(lengths, device=device)
    if part.layout == "ragged":
        starts = [r * room for r in range(rows)]
        begins = torch.tensor(starts, device=device)
        return RaggedView(
            keys, values, positions, starts, lengths, batch, HEADS, begins, begins + counts, key_scales, value_scales
        )
    pages = room // part.page
    order = torch.randperm(rows * pages, device=device)
    table = torch.empty_like(order)
    table[order] = torch.arange(rows * pages, device=device)  # page p of the pool holds what lay at order[p]
    mixed = [None if x is None else x.view(rows * pages, -1, *x.shape[1:])[order].flatten(0, 1) for x in made]
    held = positions.view(rows * pages, -1)[order].flatten()
    return PagedView(
        mixed[0],  # type: ignore[arg-type]
        mixed[2],  # type: ignore[arg-type]
        held,
        table.view(rows, pages).int(),
        lengths,
        batch,
        HEADS,
        part.page,
        counts,
        mixed[1],
        mixed[3],
    )


def problem(name: str, context: int, batch: int, device: str, scores: bool = False) -> tuple[KernelSpec, View, Queries]:
    """A spec, a cache of `context` entries a row, and one new token a sequence."""
    spec = KernelSpec(STORES[name], GROUP, DIM, DIM, DIM**-0.5, scores=scores)
    sizes = [context] if len(spec.parts) == 1 else [context - RESIDUAL, RESIDUAL]
    firsts = [0, sizes[0]]
    made = [segment(p, n, f, batch, device) for p, n, f in zip(spec.parts, sizes, firsts, strict=False)]
    q = torch.randn(batch, HEADS * GROUP, 1, DIM, device=device, dtype=torch.float16)
    at = torch.full((batch, 1), context, device=device)
    return spec, made[0] if len(made) == 1 else MixedView(tuple(made)), Queries(q, at)


def nbytes(spec: KernelSpec, view: View) -> int:
    """Bytes of keys and values, scales included, that one step must read."""
    total = 0
    for part, one in zip(spec.parts, parts(view), strict=True):
        rows = one.keys.shape[0] * HEADS if isinstance(one, DenseView) else 0
        entries = rows * one.keys.shape[2] if isinstance(one, DenseView) else sum(one.lengths)
        total += part.key.nbytes(entries, DIM) + part.value.nbytes(entries, DIM)
    return total


def gate(device: str) -> None:
    """Raise unless every storage, with and without scores, agrees with the float64 reference."""
    for name, scores in itertools.product(STORES, (False, True)):
        spec, view, queries = problem(name, 320, 2, device, scores)
        longest = sum(max(s.lengths) if not isinstance(s, DenseView) else s.keys.shape[2] for s in parts(view))
        got_sums = torch.zeros(2 * HEADS, longest, device=device)
        want_sums = got_sums.clone()
        got = backend.attend(queries, view, spec, got_sums if scores else None).double()
        want = reference.attend(queries, view, spec, want_sums if scores else None).double()
        error = float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
        lost = float((got_sums - want_sums).abs().max())
        if not error <= TOLERANCE or not lost <= TOLERANCE:
            raise KvcompileError(
                "the gate is closed: a kernel differs from the reference", f"{name}: {error:.1e}, {lost:.1e}"
            )
        print(f"{name}{' with scores' if scores else ''}: relative RMS error {error:.1e}", file=sys.stderr)


def seconds(run: Callable[[], Any], repeats: int = 30) -> float:
    """Median time on the device, its caches flushed before every run."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a 1 GiB copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def captured(run: Callable[[], Tensor]) -> Callable[[], None]:
    """A decode step as a CUDA graph; raises unless its replay gives what the call gave."""
    want = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(got, want)
    return graph.replay


def libraries(view: DenseView, q: Tensor) -> dict[str, Callable[[], Any]]:
    """Library calls over the same float16 keys and values."""
    from torch.nn.attention.flex_attention import flex_attention

    folded = q.view(q.shape[0], HEADS, GROUP, DIM)
    flex = torch.compile(flex_attention, dynamic=False)
    k, v = view.keys, view.values
    return {
        "SDPA, enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "SDPA, group folded": lambda: F.scaled_dot_product_attention(folded, k, v),
        "FlexAttention": lambda: flex(q, k, v, enable_gqa=True),
    }


def choices(spec: KernelSpec) -> list[Choice]:
    """What the tuner tries."""
    rows = tuning.default(spec, "one").rows
    grid = itertools.product((16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4), (0, 4, 8, 16, 32))
    return [Choice(tile, rows, warps, stages, splits) for tile, warps, stages, splits in grid]


def tune(context: int, batch: int) -> None:
    """The fastest choice of every storage into tuned.yaml; one that fails or is wrong is passed over."""
    name = torch.cuda.get_device_name()
    table = yaml.safe_load(TABLE.read_text("utf-8")) or {}
    for store in STORES:
        spec, view, queries = problem(store, context, batch, "cuda")
        call = Call(spec, *backend.operands(queries, view))
        want, timed = attend(call), []
        for choice in choices(spec):
            try:
                got = attend(call, None, choice)
                torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-2)
                timed.append((seconds(partial(attend, call, None, choice), 10), choice))
            except Exception as error:  # too much shared memory, too many registers: not a candidate
                print(f"{store}: {choice} left out: {str(error).splitlines()[0][:100]}", file=sys.stderr)
        best = min(timed, key=lambda t: t[0])
        table.setdefault(name, {})[tuning.family(spec, "one")] = asdict(best[1])
        print(f"{store}: {best[0] * 1e6:.0f} us with {best[1]}", file=sys.stderr)
    head = "# Tuned launches by device name and spec family, written by `python benchmarks/gpu_kernels.py --tune`.\n"
    TABLE.write_text(head + yaml.safe_dump(table, sort_keys=True), "utf-8")
    tuning.table.cache_clear()


def measure(contexts: list[int], batches: list[int]) -> str:
    """The table."""
    bandwidth = copy_bandwidth()
    rows = []
    for context, batch in itertools.product(contexts, batches):
        if nbytes_estimate(context, batch) > 0.4 * torch.cuda.get_device_properties(0).total_memory:
            continue
        for store in STORES:
            spec, view, queries = problem(store, context, batch, "cuda")
            size = nbytes(spec, view)
            step = captured(partial(backend.attend, queries, view, spec))
            runs = {f"triton {store}": step}
            if store == "float16 dense":
                assert isinstance(view, DenseView)
                runs |= libraries(view, queries.states)
            for name, run in runs.items():
                time = seconds(run)
                rate = size / time
                rows.append([context, batch, name, f"{time * 1e6:.0f}", f"{rate / 1e9:.0f}", f"{rate / bandwidth:.0%}"])
    head = ["context", "batch", "backend", "us", "GB/s", "of copy"]
    page = f"# Decode attention on {torch.cuda.get_device_name()}\n\n"
    page += f"`python {' '.join(sys.argv)}`, torch {torch.__version__}. "
    page += f"Copy bandwidth {bandwidth / 1e9:.0f} GB/s. Our steps are replayed CUDA graphs.\n\n"
    return page + tabulate(rows, head, tablefmt="github") + "\n"


def nbytes_estimate(context: int, batch: int) -> int:
    """Bytes of float16 keys and values, and of the float32 they are made from."""
    return batch * HEADS * context * DIM * 2 * (2 + 4)


def main() -> None:
    """Gate, tune, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gate", action="store_true", help="only compare with the reference")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--out")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not (args.gate and interpreted()):
        sys.exit("No GPU here, so nothing is measured. TRITON_INTERPRET=1 with --gate compares kernels on a CPU.")
    gate("cpu" if interpreted() else "cuda")
    if args.gate:
        return
    if args.tune:
        tune(32768, 8)
        gate("cuda")
    page = measure(args.contexts, args.batches)
    print(page)
    if args.out:
        Path(args.out).write_text(page, "utf-8")


if __name__ == "__main__":
    main()
