"""A decode step beside other work on the same cores, by how threads wait for one another.

    python benchmarks/neighbours.py --out benchmarks/results/neighbours

Each row is a process of its own that decodes the default model over a cache of --tokens tokens, with `OMP_WAIT_POLICY`
unset (threads that wait spin for a while) or PASSIVE (they sleep). Beside it runs nothing, a program that counts on one
core, or a process that decodes the same, with either policy. In turns, --rounds times; `step ms` is the median of all
steps, `slowest ms` the slowest of a hundred (99 %), and `x` the median over that of the same process alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import IO, Any

POLICIES = {"unset": None, "PASSIVE": "PASSIVE"}
COUNTS, DECODES = "counts", "decodes"


class Decoder:
    """A process that decodes when it is told to."""

    def __init__(self, policy: str | None, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", "--tokens", str(args.tokens), "--dtype", args.dtype]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        self.answer()

    def answer(self) -> Any:
        """What it says next."""
        said = _pipe(self.process.stdout).readline()
        if not said:
            raise SystemExit("a process that decodes has ended")
        return json.loads(said)

    def tell(self, word: str) -> None:
        """`steps N`: answer with the seconds of each; `on`: decode until the next word, which is not done."""
        _pipe(self.process.stdin).write(word + "\n")

    def steps(self, count: int) -> list[float]:
        """Seconds of so many steps."""
        self.tell(f"steps {count}")
        return list(self.answer())


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise RuntimeError("no pipe was asked for")
    return pipe


def worker(args: argparse.Namespace) -> None:
    """Decode, as the lines of stdin say."""
    import torch
    from decode_linear import seconds
    from decode_step import filled

    import kvcompile
    from kvcompile.config.schema import ModelConfig
    from kvcompile.models.loading import load

    original, _ = load(ModelConfig(dtype=args.dtype))
    model = kvcompile.compile(original)
    cache = filled(model.new_cache(), model.kvcompile.plan, 1, args.tokens, model.dtype)
    token = torch.full((1, 1), 42, dtype=torch.int64, device=model.device)

    def step() -> Any:
        with torch.inference_mode():
            return model(token, past_key_values=cache)

    step()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        word, *count = line.split()
        if word == "steps":
            print(json.dumps([seconds(step) for _ in range(int(count[0]))]), flush=True)
        elif word == "on":
            while not select.select([sys.stdin], [], [], 0)[0]:
                step()


@contextlib.contextmanager
def beside(kind: str, decoder: Decoder | None) -> Iterator[None]:
    """Something that keeps cores busy meanwhile."""
    if decoder is not None:
        decoder.tell("on")
        yield
        decoder.tell("off")
    elif kind == COUNTS:
        process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            yield
        finally:
            process.kill()
            process.wait()
    else:
        yield


def main() -> None:
    """Start, measure in turns, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    ours = {name: Decoder(policy, args) for name, policy in POLICIES.items()}
    others = {f"{DECODES}, {name}": Decoder(policy, args) for name, policy in POLICIES.items()}
    kinds: dict[str, Decoder | None] = {"nothing": None, COUNTS: None, **others}
    taken: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in ours for kind in kinds}
    try:
        for _ in range(args.rounds):
            for (name, kind), mine in taken.items():
                with beside(kind, kinds[kind]):
                    ours[name].steps(3)
                    mine += ours[name].steps(args.steps)
    finally:
        for decoder in (*ours.values(), *others.values()):
            decoder.process.kill()
    from tables import show

    middle = {key: statistics.median(mine) for key, mine in taken.items()}
    rows = [
        {
            "ours": name,
            "beside": kind,
            "step ms": round(1e3 * middle[name, kind], 1),
            "slowest ms": round(1e3 * statistics.quantiles(mine, n=100)[-1], 1),
            "x": round(middle[name, kind] / middle[name, "nothing"], 2),
        }
        for (name, kind), mine in taken.items()
    ]
    show(args.out, rows, args.dtype)


if __name__ == "__main__":
    main()
