"""Everything there is to know of a GPU, in five minutes: what it runs, whether that is right, and how fast it is.

    python benchmarks/gpu_all.py --out benchmarks/results/gpu_all
    TRITON_INTERPRET=1 python benchmarks/gpu_all.py --recipes kivi --dtypes float32 --seconds 600   # on a CPU, no times

Three parts, each in processes of its own with a limit on its time, so that one that hangs or crashes leaves what the
others found: `kvcompile doctor` (machine, devices, the backend of each recipe), every kernel of attention that the
shipped recipes need against the float64 reference (`kernels/selfcheck`, workers side by side), then
`benchmarks/gpu_kernels.py` (its gate, and times against SDPA, FlexAttention and the copy bandwidth). One page, written
after each part; exit code 1 where a kernel is wrong or a part did not end. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from tabulate import tabulate

from kvcompile.doctor.recipes import names, needs
from kvcompile.errors import first_line
from kvcompile.kernels.dispatch import named
from kvcompile.kernels.selfcheck.check import TOLERANCE, differences
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.triton.launch import interpreted

HERE = Path(__file__).resolve()
SHARES = {"doctor": 0.15, "kernels": 0.35, "times": 0.5}  # of the time; what a part leaves goes to the next


def wanted(recipes: list[str], dtype: str, device: torch.device) -> list[KernelSpec]:
    """Every kernel that Triton's generator has for these recipes; a cache in `dtype`."""
    settings = [f"model.dtype={dtype}", f"model.device={device.type}", "kernels=triton"]
    backend, kind = named("triton"), getattr(torch, dtype)
    specs = dict.fromkeys(spec for each in needs(recipes, settings) for spec in each.specs)
    return [spec for spec in specs if backend.supports(spec, kind)]


def check(recipes: list[str], dtypes: list[str], share: tuple[int, int], device: torch.device) -> None:
    """Print a line of JSON for each kernel of this worker's share: which of how many."""
    cases = [(spec, dtype) for dtype in dtypes for spec in wanted(recipes, dtype, device)]
    print(json.dumps({"kernels": len(cases[share[0] :: share[1]])}), flush=True)
    with torch.no_grad():
        for spec, dtype in cases[share[0] :: share[1]]:
            error, problem = 0.0, ""
            kind = getattr(torch, dtype)
            for what, found in differences(named("triton"), spec, kind, device):
                failed = isinstance(found, Exception)
                error = max(error, float("inf") if isinstance(found, Exception) else found)
                if failed or not found <= TOLERANCE[kind]:
                    problem = f"{what}: {type(found).__name__}: {first_line(found)}" if failed else what  # type: ignore[arg-type]
                    break
            print(json.dumps({"kernel": spec.name, "dtype": dtype, "error": error, "problem": problem}), flush=True)


class Parts:
    """The parts of a run, and the page that they make. limit: seconds for all."""

    def __init__(self, limit: float, out: str | None) -> None:
        self.end, self.limit, self.out = time.monotonic() + limit, limit, out
        self.pages: list[str] = []
        self.problems: list[str] = []

    def run(self, part: str, commands: list[list[str]]) -> list[str]:
        """What each command printed to stdout, within the part's time; a problem for each that failed or was ended."""
        later = sum(share for name, share in SHARES.items() if [*SHARES].index(name) > [*SHARES].index(part))
        stop = self.end - later * self.limit
        with tempfile.TemporaryDirectory() as folder:
            files: list[TextIO] = [open(Path(folder) / str(i), "w+", encoding="utf-8") for i in range(len(commands))]  # noqa: SIM115
            running = [
                subprocess.Popen(command, stdout=file, cwd=HERE.parent.parent, text=True)
                for command, file in zip(commands, files, strict=True)
            ]
            for process in running:
                self._wait(part, process, stop)
            for file in files:
                file.seek(0)
            printed = [file.read() for file in files]
            for file in files:
                file.close()
        return printed

    def _wait(self, part: str, process: subprocess.Popen[str], stop: float) -> None:
        try:
            code = process.wait(max(1.0, stop - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self.problems.append(f"{part}: ended after its share of {self.limit:.0f} s")
        else:
            if code:
                self.problems.append(f"{part}: exit code {code}")

    def add(self, title: str, text: str) -> None:
        """One part of the page, and what there is of the page to where it belongs."""
        self.pages.append(f"## {title}\n\n{text.strip()}\n")
        if self.out:
            Path(self.out + ".md").write_text(self.page(), "utf-8")

    def page(self) -> str:
        """All of it, what went wrong first."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter, on a CPU"
        head = (
            f"# {device}\n\n{time.strftime('%Y-%m-%d')}, torch {torch.__version__}\n\n    python {' '.join(sys.argv)}\n"
        )
        problems = "".join(f"- {each}\n" for each in self.problems) or "Nothing went wrong.\n"
        return "\n".join([head, problems, *self.pages])


def doctor(parts: Parts, device: torch.device) -> None:
    """The machine, and who attends to each recipe's layers; its kernels are checked in the next part."""
    command = [sys.executable, "-m", "kvcompile", "doctor", "--no-checks", f"model.device={device.type}"]
    (text,) = parts.run("doctor", [command])
    parts.add("What this machine runs", f"    kvcompile {' '.join(command[3:])}\n\n```\n{text.strip()}\n```")


def kernels(parts: Parts, arguments: argparse.Namespace) -> None:
    """Whether the kernels are right; those that are not by name, and how many were not reached."""
    command = [sys.executable, str(HERE), "--dtypes", *arguments.dtypes, "--recipes", *arguments.recipes]
    count = arguments.workers
    printed = parts.run("kernels", [[*command, "--share", str(i), str(count)] for i in range(count)])
    lines = [json.loads(line) for each in printed for line in each.splitlines() if line.startswith("{")]
    rows = [line for line in lines if "kernel" in line]
    missing = sum(line.get("kernels", 0) for line in lines) - len(rows)
    if missing or not rows:
        parts.problems.append(f"kernels: {missing or 'all'} were not reached")
    parts.problems += [
        f"{r['kernel']} for {r['dtype']}: {r['problem']}, {r['error']:.1e}" for r in rows if r["problem"]
    ]
    table = tabulate(table_of(rows), headers="keys", tablefmt="github", floatfmt=".1e")
    about = (
        f"{len(rows)} kernels of {len(arguments.recipes)} recipes, relative RMS difference from the float64 reference."
    )
    parts.add("Whether its kernels are right", f"{about}\n\n{table}")


def table_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By dtype: kernels, how many are right, and the largest difference among those."""
    total = Counter(row["dtype"] for row in rows)
    right = {dtype: [row["error"] for row in rows if row["dtype"] == dtype and not row["problem"]] for dtype in total}
    return [
        {"dtype": dtype, "kernels": n, "right": len(right[dtype]), "largest difference": max(right[dtype], default=0.0)}
        for dtype, n in total.items()
    ]


def times(parts: Parts, device: torch.device) -> None:
    """`gpu_kernels.py`: its gate, then how fast kernels are; where there is no GPU, the gate alone."""
    command = [sys.executable, str(HERE.with_name("gpu_kernels.py"))]
    if device.type == "cpu":
        parts.run("times", [[*command, "--gate"]])
        parts.add("How fast they are", "Not measured: no GPU.")
        return
    (text,) = parts.run("times", [[*command, "--contexts", "4096", "32768", "--batches", "1", "8"]])
    parts.add("How fast they are", text.replace("# ", "### ", 1))


def main() -> None:
    """Parse, run the parts, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipes", nargs="+", default=names(), help="whose kernels are checked (default: all shipped)"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=300.0, help="for all parts together")
    parser.add_argument("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=[*SHARES])
    parser.add_argument("--out", help="where the page goes, without .md")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)  # of a worker
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not interpreted():
        sys.exit("No GPU here, so nothing was run. TRITON_INTERPRET=1 checks kernels on a CPU, slowly: name --recipes.")
    device = torch.device("cpu" if interpreted() else "cuda")
    if arguments.share:
        return check(arguments.recipes, arguments.dtypes, tuple(arguments.share), device)
    parts = Parts(arguments.seconds, arguments.out)
    runs: dict[str, Callable[[], None]] = {
        "doctor": lambda: doctor(parts, device),
        "kernels": lambda: kernels(parts, arguments),
        "times": lambda: times(parts, device),
    }
    for part in arguments.parts:
        runs[part]()
    print(parts.page())
    if parts.problems:
        raise SystemExit(1)
    return None


if __name__ == "__main__":
    main()
