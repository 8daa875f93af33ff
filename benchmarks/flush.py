"""Encoding of a layer's old tokens, by torch and by generated C++ (encoder and compactor) in turns in one process.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/flush.py --out benchmarks/results/flush

prompt: the whole of `flush` after a prompt of `--tokens` tokens (gather, encode, write the codes, give the rest back);
flush: the same when 32 decoded tokens a row are encoded. encode: the part of it that makes codes.
Medians over `--rounds`, milliseconds a layer; faster: torch over C++, of whole flushes.
Nothing is printed unless both ways leave the very same bytes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from kvcompile.kernels.codecs import Encoder
from kvcompile.kernels.compact import Compactor
from kvcompile.kernels.cpp import build
from kvcompile.kernels.dispatch import named
from kvcompile.kernels.layout import RaggedView
from kvcompile.plan.storage import FLUSH, Codec, Storage
from kvcompile.runtime.cache import HEADROOM
from kvcompile.stores import factory
from kvcompile.stores.encoded.quantized import QuantizedStore

FORMATS = {
    "kivi int4": (Codec("int4", "channel", 32), Codec("int4", "token", 32), 128),
    "kivi int2": (Codec("int2", "channel", 32), Codec("int2", "token", 32), 128),
    "int8": (Codec("int8", "token"), Codec("int8", "token"), 0),
    "fp8": (Codec("float8", "token"), Codec("float8", "token"), 0),
}
SHAPES = {"3x64": (3, 64), "8x128": (8, 128)}
WAYS = {"torch": "sdpa", "C++": "cpp"}


class Timed:
    """An encoder that adds up the time it takes."""

    def __init__(self, encode: Encoder) -> None:
        self.encode, self.seconds = encode, 0.0

    def __call__(self, x: Tensor, codec: Codec) -> tuple[Tensor, Tensor | None]:
        """Codes and scales."""
        start = time.perf_counter()
        found = self.encode(x, codec)
        self.seconds += time.perf_counter() - start
        return found


def new(heads: int, tokens: int, dim: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys `[1, H_kv, n, D]`, values and positions `[1, n]` of new tokens."""
    keys, values = torch.randn(2, 1, heads, tokens, dim)
    return keys, values, torch.arange(start, start + tokens).unsqueeze(0)


def prompted(format: str, shape: str, tokens: int, encode: Encoder) -> QuantizedStore:
    """A store that holds a prompt, as it is when `flush` is called."""
    key, value, residual = FORMATS[format]
    heads, dim = SHAPES[shape]
    fresh = new(heads, tokens, dim, 0)
    store = QuantizedStore(Storage(key, value, residual), factory.contiguous(*fresh[:2], None, 0), encode)
    store.append(*fresh, 0)
    return store


def contents(store: QuantizedStore) -> list[Tensor]:
    """Every code, scale, position and plain number held."""
    view = store.codes.segment() if store.codes is not None else None
    if not isinstance(view, RaggedView):
        raise SystemExit("nothing was encoded")
    rows = list(zip(view.starts, view.lengths, strict=True))
    tensors = (view.keys, view.key_scales, view.values, view.value_scales, view.positions)
    found = [x for row in store.residual.rows() for x in row]
    for x, n in zip(tensors, store.format.steps, strict=True):
        found += [x[s // n : (s + count) // n] for s, count in rows if x is not None]
    return found


def flushed(store: QuantizedStore, release: bool, move: Compactor) -> tuple[float, float]:
    """Seconds of one flush, and those in it that encode."""
    timed = store.format.encoder
    timed.seconds = 0.0  # type: ignore[attr-defined]
    start = time.perf_counter()
    store.flush(HEADROOM, release, move)
    return time.perf_counter() - start, timed.seconds  # type: ignore[attr-defined]


def race(format: str, shape: str, tokens: int, rounds: int) -> list[dict[str, object]]:
    """Rows of the table: a prompt, then a flush, both ways in turns over the same numbers."""
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    heads, dim = SHAPES[shape]
    for round_ in range(rounds + 2):  # the first two warm up
        left = {}
        for name, backend in WAYS.items():
            torch.manual_seed(round_)
            move = named(backend).compact
            store = prompted(format, shape, tokens, Timed(named(backend).encode))
            prompt = flushed(store, True, move)
            store.append(*new(heads, FLUSH, dim, tokens), HEADROOM)
            flush = flushed(store, False, move)
            left[name] = contents(store)
            if round_ > 1:
                taken.setdefault(("prompt", name), []).append(prompt)
                taken.setdefault(("flush", name), []).append(flush)
        if not all(_same(a, b) for a, b in zip(*left.values(), strict=True)):
            raise SystemExit(f"{format} {shape}: C++ leaves other bytes than torch")
    rows = []
    for what in ("prompt", "flush"):
        whole = {name: 1e3 * statistics.median(t for t, _ in taken[what, name]) for name in WAYS}
        inside = {name: 1e3 * statistics.median(t for _, t in taken[what, name]) for name in WAYS}
        row: dict[str, object] = {"format": format, "heads x dim": shape, "after": what}
        row |= {f"{name} ms": f"{whole[name]:.3f}" for name in WAYS}
        row |= {f"{name} encode": f"{inside[name]:.3f}" for name in WAYS}
        rows.append({**row, "faster": f"{whole['torch'] / whole['C++']:.2f}"})
    return rows


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@torch.inference_mode()
def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = [row for shape in SHAPES for f in FORMATS for row in race(f, shape, args.tokens, args.rounds)]
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    head = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads"
    head += f", torch {torch.__version__}, {build.describe()}; {args.tokens} tokens, one sequence"
    print(f"{head}\n\n{text}")
    if args.out:
        command = f"    OMP_WAIT_POLICY=PASSIVE python {' '.join(sys.argv)}"
        Path(args.out + ".md").write_text(f"{head}\n\n{command}\n\n{text}\n", "utf-8")


if __name__ == "__main__":
    main()
