"""A fixed sample of the spec space: every value of every field occurs, and features meet each other at random."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.kernels.triton.forms import rows_for
from kvcompile.kernels.triton.tuning import Choice
from kvcompile.plan.storage import Codec

FLOATS = [Codec(kind) for kind in ("float32", "float16", "bfloat16")]
QUANTIZED = [
    *(Codec(f"int{bits}", "channel", group) for bits in (8, 4, 2) for group in (32, 8)),
    *(Codec(f"int{bits}", "token", group) for bits in (8, 4, 2) for group in (0, 16)),
    Codec("float8", "token"),
    Codec("float8", "token", 16),
    Codec("float8", "channel", 16),
    Codec("float8"),
]
LAYOUTS = ("dense", "ragged", "paged")
DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 2, 3, 4, 5, 7, 16, 20)
SIZES = (0, 1, 15, 16, 17, 32, 33, 64, 65, 97)  # around the borders of tiles (16, 32), pages and splits


@dataclass(frozen=True)
class Sample:
    """A spec, rows to run it over, and how the kernel is cut."""

    spec: KernelSpec
    lengths: list[list[int]]
    batch: int
    heads: int
    count: int
    padded: bool
    dtype: str
    choice: Choice


def samples(number: int, seed: int = 0) -> list[Sample]:
    """`number` samples; the i-th uses the i-th codec for keys, and so on around, the rest is drawn."""
    draw = random.Random(seed)
    return [_sample(i, draw) for i in range(number)]


def _sample(i: int, draw: random.Random) -> Sample:
    batch, heads = draw.choice([(1, 2), (2, 1), (2, 2)])
    quantized = QUANTIZED[i % len(QUANTIZED)], QUANTIZED[(7 * i + 3) % len(QUANTIZED)]
    residual = FLOATS[i % 3]
    kinds = [
        [quantized, (residual, residual)],
        [(residual, residual)],
        [quantized],
        [quantized, (draw.choice(QUANTIZED), draw.choice(QUANTIZED)), (residual, residual)],
    ]
    kind = kinds[(0, 0, 1, 2, 3)[i % 5]]
    parts = tuple(_part(k, v, LAYOUTS[(i + n) % 3], draw) for n, (k, v) in enumerate(kind))
    each = batch * heads
    lengths = [
        [draw.choice(SIZES)] * each if p.layout == "dense" else [draw.choice(SIZES) for _ in range(each)] for p in parts
    ]
    count = (1, 1, 4)[i % 3]
    if parts[-1].layout == "dense" and max(block(parts[-1]), lengths[-1][0]) < count:
        lengths[-1] = [16] * each
    dim = DIMS[i % 5]
    window = draw.choice([None, None, 24])
    group = GROUPS[i % len(GROUPS)]
    spec = KernelSpec(
        parts,
        group,
        dim,
        draw.choice([dim, dim, 64, 80, 128]),
        dim**-0.5 * draw.choice([1.0, 0.7]),
        window,
        softcap=draw.choice([None, None, 5.0]),
        scores=draw.random() < 0.4,
        sink=draw.random() < 0.3,
    )
    # as long as keys and values lie in one unit, a whole number of real tokens ends each row
    padded = count > 1 and batch > 1 and parts[-1].layout != "dense" and block(parts[-1]) == 1 and draw.random() < 0.7
    dtype = ("float32", "float32", "float16", "bfloat16")[i % 4]
    # the interpreter takes some 10 ms a tile: few programs where there are many queries
    rows = rows_for(spec) if count == 1 else draw.choice([16, 32] if group < 8 else [64])
    choice = Choice(draw.choice([16, 32, 64]), rows, 4, 2, draw.choice([1, 2, 3, 8] if count == 1 else [1, 2]))
    return Sample(spec, lengths, batch, heads, count, padded, dtype, choice)


def block(part: Part) -> int:
    """Tokens that are encoded together."""
    return max(c.group if c.axis == "channel" else 1 for c in (part.key, part.value))


def _part(key: Codec, value: Codec, layout: str, draw: random.Random) -> Part:
    if layout != "paged":
        return Part(layout, key, value)
    unit = block(Part(layout, key, value))
    return Part(layout, key, value, draw.choice([p for p in (4, 8, 16, 32, 64) if p % unit == 0]))
