"""All linear layers of one decoded token, SmolLM2-135M's shapes: F.linear and DecodeLinear in turns in one process.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode_linear.py --out benchmarks/results/decode_linear

30 layers and the head, every weight of its own, so that each pass reads all of them from memory. `best` adds up each
layer's fastest call, which other work on the machine hardly changes; `median` is that of whole passes. `read` is the
speed at which the same threads sum a large array: nothing that reads each weight once can be much faster.
Nothing is printed unless the results agree with float64.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

from kvcompile.kernels.cpp import build, lower, simd

LAYER = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
HEAD = (576, 49152)
READ = """
extern "C" float read_all(const float* p, int64_t n, int threads) {
  float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t block = 0; block < n / 16384; block++) {  // 64 KB: eight streams of two pages each
    const float* q = p + block * 16384;
    F s[8] = {zero(), zero(), zero(), zero(), zero(), zero(), zero(), zero()};
    for (int i = 0; i < 2048; i += 16)
      for (int j = 0; j < 8; j++) {
        s[j] += load(q + 2048 * j + i);
        __builtin_prefetch(q + 2048 * j + i + 8192, 0, 2);
      }
    total += sum(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
  }
  return total;
}
"""


def seconds(run: Callable[[], object]) -> float:
    """One run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Reader:
    """Reads an array that no cache holds, with these threads; `rate` is the best so far, in bytes a second."""

    def __init__(self) -> None:
        self.parts, self.rate = torch.ones(64 << 20).chunk(8), 0.0
        self.function = build.load(simd.prelude() + READ, "read")["read_all"]
        self.function.argtypes, self.function.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], ctypes.c_float

    def run(self) -> None:
        """All of it once."""
        for part in self.parts:
            arguments = (part.data_ptr(), part.numel(), torch.get_num_threads())
            self.rate = max(self.rate, 4 * part.numel() / seconds(lambda a=arguments: self.function(*a)))


def layers(dtype: torch.dtype) -> list[nn.Module]:
    """Every linear layer in the order in which a token meets them."""
    return [nn.Linear(k, n, bias=False, dtype=dtype) for k, n in [*LAYER * 30, HEAD]]


def check(plain: list[nn.Module], ours: list[nn.Module], inputs: dict[int, Tensor]) -> None:
    """Refuse to time what is wrong."""
    for module, lowered in [*zip(plain[:7], ours[:7], strict=True), (plain[-1], ours[-1])]:
        x = inputs[module.in_features]
        true = x.double() @ module.weight.double().T
        error = (lowered(x).double() - true).norm() / true.norm()
        if error > (1e-6 if x.dtype == torch.float32 else 3e-3):
            raise SystemExit(f"wrong result: {module}, {x.dtype}, relative error {error:.1e}")


def main() -> None:
    """Parse, check, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--passes", type=int, default=15)
    parser.add_argument("--out")
    args = parser.parse_args()
    rows, reader = [], Reader()
    for dtype in (torch.float32, torch.bfloat16):
        plain = layers(dtype)
        ours = copy.deepcopy(plain)
        lower.lower(nn.ModuleList(ours))
        size = sum(m.weight.numel() for m in plain) * dtype.itemsize
        for count in args.rows:
            inputs = {k: torch.randn(1, count, k).to(dtype) for k in (576, 1536)}
            taken: dict[str, list[list[float]]] = {"F.linear": [], "DecodeLinear": []}
            with torch.inference_mode():
                check(plain, ours, inputs)
                for _ in range(args.passes):
                    reader.run()
                    for name, modules in zip(taken, (plain, ours), strict=True):
                        taken[name].append([seconds(lambda m=m, x=inputs[m.in_features]: m(x)) for m in modules])
            best = {name: sum(map(min, zip(*times, strict=True))) for name, times in taken.items()}
            for name, times in taken.items():
                rows.append(
                    {
                        "weights": str(dtype).removeprefix("torch."),
                        "rows": count,
                        "": name,
                        "median ms": round(1e3 * statistics.median(map(sum, times)), 1),
                        "best ms": round(1e3 * best[name], 1),
                        "GB/s": round(size / best[name] / 1e9, 1),
                        "faster": round(best["F.linear"] / best[name], 2),
                    }
                )
    text = tabulate(rows, headers="keys", tablefmt="github")
    head = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads"
    head += f", torch {torch.__version__}, {build.describe()}; read {reader.rate / 1e9:.1f} GB/s"
    print(f"{head}\n\n{text}")
    if args.out:
        command = f"    OMP_WAIT_POLICY=PASSIVE python {' '.join(sys.argv)}"
        Path(args.out + ".md").write_text(f"{head}\n\n{command}\n\n{text}\n")


if __name__ == "__main__":
    main()
