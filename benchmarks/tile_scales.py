"""What tiles with scales of tokens and channels (KVarN) would hold in place of int4 per token, at equal bytes.

    python benchmarks/tile_scales.py --half a --wikitext FILE --tokens 4096 --shares 1/24 --stacks none --out NAME

No store holds KVarN's tiles: the entries that `ghost` keeps are put into the Hadamard basis, replaced by what a tile
would give back, and asked as in `asked_later.py`, whose options these are. Each cache keeps as many entries as its
bytes allow, position included. A tile is 128 entries of one head, tokens by channels:

    y_td = x_td / (r_t c_d), with r and c such that rows and columns of y have equal standard deviations (Sinkhorn)
    keys: 4 bits, least and largest of each channel; values: 2 bits, least and largest of each token

Sinks stay in float16, entries that fill no tile are int4 per token. Bytes of a tile of n entries of D channels: keys
n (D / 2 + 2) + 4 D, values n (D / 4 + 4) + 2 D. Source: KVarN, arXiv 2606.03458.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch
from asked_later import Case, Record, arguments, cases, tables
from cpu_kernels import processor
from equal_bytes import DENSE, Row, positions
from haystacks import command
from torch import Tensor

from kvcompile.analysis.compare.contest import Contest
from kvcompile.analysis.compare.forced import continued, forced
from kvcompile.config.compose import compose
from kvcompile.models.loading import load
from kvcompile.runtime.cache import KVCache

TILE, ROUNDS, SINKS, LEAST = 128, 16, 4, 1e-4
STEPS = 9  # of the search for the budget that fills the bytes
KEPT = "policy=[ghost,global_topk,rotate]"


def rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    """`x` in so many bits, between the least and the largest along `dim`."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8).half().float()
    return ((x - low.half()) / scale).round().clamp(0, 2**bits - 1) * scale + low.half()


def balanced(x: Tensor) -> tuple[Tensor, Tensor]:
    """r `[n, 1]` and c `[1, D]` after which rows and columns of `x [n, D]` spread alike: the best of the rounds."""
    r, c = torch.ones_like(x[:, :1]), torch.ones_like(x[:1])
    best, least = (r, c), float("inf")
    for _ in range(ROUNDS):
        r = r * (x / (r * c)).std(1, keepdim=True).clamp(min=LEAST)
        c = c * (x / (r * c)).std(0, keepdim=True).clamp(min=LEAST)
        y = x / (r * c)
        uneven = float(y.std(0).log().std() + y.std(1).log().std())
        if uneven < least:
            best, least = (r, c), uneven
    r, c = best
    level = c.log().mean().exp()
    return (r * level).half().float(), (c / level).half().float()


def tiled(x: Tensor, bits: int, dim: int) -> Tensor:
    """What a tile gives back of `x [n, D]`."""
    r, c = balanced(x)
    return rounded(x / (r * c), bits, dim) * r * c


def per_token(x: Tensor) -> Tensor:
    """int4, a scale and a zero for 64 channels of a token."""
    return rounded(torch.unflatten(x, -1, (-1, 64)), 4, -1).flatten(-2)


def int4(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """A row `[n, D]` in int4 per token."""
    return per_token(keys), per_token(values)


def int4_bytes(n: int, dim: int) -> int:
    """Of a row of n entries."""
    return 2 * n * (dim // 2 + dim // 64 * 4)


def tiles(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """A row in float16 sinks, whole tiles and int4 behind them."""
    end = tiles_end(keys.shape[0])
    pieces = [(keys[:SINKS].half().float(), values[:SINKS].half().float())]
    for at in range(SINKS, end, TILE):
        here = slice(at, at + TILE)
        pieces.append((tiled(keys[here], 4, 0), tiled(values[here], 2, 1)))
    pieces.append(int4(keys[end:], values[end:]))
    return torch.cat([k for k, _ in pieces]), torch.cat([v for _, v in pieces])


def tiles_end(n: int) -> int:
    """Where the tiles of a row of n entries end."""
    return SINKS + max(0, n - SINKS) // TILE * TILE


def tiles_bytes(n: int, dim: int) -> int:
    """Of a row of n entries."""
    whole, end = (tiles_end(n) - SINKS) // TILE, tiles_end(n)
    a_tile = TILE * (dim // 2 + 2) + 4 * dim + TILE * (dim // 4 + 4) + 2 * dim
    return whole * a_tile + int4_bytes(n - end, dim) + 4 * dim * SINKS


Forms = tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], Callable[[int, int], int]]
FORMS: dict[str, Forms] = {"ghost, int4 a token": (int4, int4_bytes), "ghost, tiles K4V2": (tiles, tiles_bytes)}


def filled(contest: Contest, form: Forms, case: Case, allowed: Fraction) -> tuple[Row, KVCache, int]:
    """The fullest cache of a context within the bytes `allowed`, in its form; its row and its bytes."""
    (give_back, bytes_of), (low, high) = form, (0.01, 1.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        nbytes = sum(_bytes(_kept(contest, middle, case)[1], bytes_of))
        low, high = (middle, high) if nbytes <= allowed else (low, middle)
    row, cache = _kept(contest, low, case)
    cache = cache.fork()
    for layer in cache.layers:
        for keys, values, _ in layer.held.rows():
            for held, back in zip((keys, values), give_back(keys.float(), values.float()), strict=True):
                held.copy_(back)
    return row, cache, sum(_bytes(cache, bytes_of))


def _kept(contest: Contest, part: float, case: Case) -> tuple[Row, KVCache]:
    row = Row("", (KEPT, f"stack.global_topk.budget={part:.5f}"), contest)
    return row, row.runner.cache(case.context, len(case.context))


def _bytes(cache: KVCache, bytes_of: Callable[[int, int], int]) -> Iterator[int]:
    for layer in cache.layers:
        for n in layer.held.lengths:
            yield bytes_of(n, layer.plan.head_dim) + positions(n)


def asked(row: Row, cache: KVCache, case: Case) -> Record:
    """What is said over a cache, as `asked_later.py` records it."""
    if case.rest:
        return {"loss": continued(row.runner, cache, case.rest)}
    every = []
    for question, right in case.questions:
        tried = [forced(row.runner, cache.fork(), question, a) for a in right]
        every.append([float(any(t.exact for t in tried)), min(t.nll for t in tried)])
    return {"answers": every}


def main() -> None:
    """Measure and write."""
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(replace(compose(args.model).model, dtype="float32", device="cpu"))
    contest = Contest(model, tokenizer)
    whole = replace(contest.dense, dtype="bfloat16")
    records = []
    for number, case in enumerate(cases(args, tokenizer)):
        dense = sum(layer.dense_bytes for layer in whole.bytes(1, len(case.context)))
        where = {"text": case.text, "form": case.form, "setting": "hidden", "case": number, "dense": dense}
        row = Row(DENSE, (), contest)
        cache = row.runner.cache(case.context, len(case.context))
        records.append({"row": DENSE, "held": dense, **where, **asked(row, cache, case)})
        for share in args.shares:
            for label, form in FORMS.items():
                row, cache, nbytes = filled(contest, form, case, Fraction(share) * dense)
                record = {"row": f"{label}, {share}", "held": nbytes, "kept": sum(map(sum, cache.lengths()))}
                records.append({**record, **where, **asked(row, cache, case)})
        print(number, [(r["row"], r.get("answers", r.get("loss"))) for r in records if r["case"] == number], flush=True)
    labels = list(dict.fromkeys(r["row"] for r in records))
    head = f"{time.strftime('%Y-%m-%d')}, {processor()}, torch {torch.__version__}, {args.tokens} tokens\n\n    "
    Path(args.out + ".md").write_text(f"{head}{command()}\n\n{tables(labels, records, {})}\n", encoding="utf-8")
    Path(args.out + ".json").write_text(json.dumps(records) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
