"""Attention of a prompt's last queries to all entries of a layer: the C++ kernel of column sums and torch, in turns.

    python benchmarks/window_sums.py --out benchmarks/results/window_sums

Medians of the times, and of their ratio by round. Nothing is printed unless both agree.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tabulate import tabulate
from torch import Tensor

from kvcompile.kernels.cpp import backend as cpp
from kvcompile.kernels.layout import DenseView, Queries
from kvcompile.kernels.spec import KernelSpec, plain
from kvcompile.runtime.observation import Observation

SHAPES = {"9/3x64": (9, 3, 64), "32/8x128": (32, 8, 128)}
ROUNDS = 15


def ways(shape: tuple[int, int, int], entries: int, window: int) -> dict[str, Callable[[], Tensor]]:
    """Mean attention `[H_kv, n]` of `window` queries, float32, both ways."""
    heads, kv_heads, dim = shape
    group = heads // kv_heads
    q, k, v = (torch.randn(1, h, n, dim) for h, n in ((heads, window), (kv_heads, entries), (kv_heads, entries)))
    asked, at = torch.arange(entries - window, entries), torch.arange(entries, dtype=torch.int32)
    spec = KernelSpec(plain("dense", "float32"), group, dim, dim, dim**-0.5, scores=True)
    view = DenseView(k, v, at.expand(1, 1, -1).contiguous())

    def torch_way() -> Tensor:
        rows, places = q[0].view(kv_heads, group, window, dim), at.expand(kv_heads, -1)
        held = torch.full((kv_heads,), entries)
        return Observation(rows, asked, k[0], v[0], places, held, entries, dim**-0.5).mean_attention()

    def kernel() -> Tensor:
        sums = torch.zeros(kv_heads, entries)
        cpp.column_sums(Queries(q, asked[None]), view, spec, sums)
        return sums / (group * window)

    return {"torch": torch_way, "kernel": kernel}


def measure(shape: str, entries: int, window: int) -> dict[str, object]:
    """One row of the table."""
    both = ways(SHAPES[shape], entries, window)
    if not torch.allclose(both["torch"](), both["kernel"](), rtol=1e-4, atol=1e-8):
        sys.exit(f"they differ at {shape}, {entries} entries, {window} queries: nothing was timed")
    taken: dict[str, list[float]] = {name: [] for name in both}
    for round_ in range(ROUNDS):
        for name in sorted(both, reverse=round_ % 2 == 0):
            start = time.perf_counter()
            both[name]()
            taken[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(taken["torch"], taken["kernel"], strict=True)]
    times = {f"{name} ms": round(1000 * median(mine), 2) for name, mine in taken.items()}
    return {"heads": shape, "entries": entries, "queries": window, **times, "faster": round(median(ratios), 2)}


@torch.inference_mode()
def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [measure(shape, n, w) for shape in SHAPES for n in (1024, 4096, 16384) for w in (8, 32, 64)]
    text = tabulate(rows, headers="keys", tablefmt="github")
    print(text)
    if args.out:
        head = f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32"
        Path(args.out + ".md").write_text(f"{head}\n\n    python {' '.join(sys.argv)}\n\n{text}\n")


if __name__ == "__main__":
    main()
