"""Rows in any layout and number format, with NaN or garbage in every place that no kernel may read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompile.kernels.codecs import decode, dtype_of, encode
from kvcompile.kernels.layout import DenseView, MixedView, PagedView, Queries, RaggedView, Segment, View
from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.plan.storage import Codec

POISON_CODE = 0xA5


@dataclass
class Quantized:
    """A spec, its view, queries, and the rows as decoded floats (what any kernel must compute with)."""

    spec: KernelSpec
    view: View
    queries: Queries


def block(part: Part) -> int:
    """Tokens that a row of this part must be a multiple of."""
    return max(c.group if c.axis == "channel" else 1 for c in (part.key, part.value))


def case(
    spec: KernelSpec,
    lengths: list[list[int]],
    batch: int,
    heads: int,
    seed: int = 0,
    count: int = 1,
    valid: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    slack: int = 3,
) -> Quantized:
    """`lengths[part][row]` entries (rounded down to the part's block); the last part ends with the `count` new tokens.

    Positions ascend along a row, with gaps; the new tokens' are the last ones. `valid [B, count]` marks padding,
    whose keys are not stored (rows then end with that sequence's real tokens).
    """
    g = torch.Generator().manual_seed(seed)
    rows = batch * heads
    real = torch.full((batch,), count) if valid is None else valid.sum(1)
    sizes = [[n // block(p) * block(p) for n in row] for p, row in zip(spec.parts, lengths, strict=True)]
    for r in range(rows):
        unit = block(spec.parts[-1])
        sizes[-1][r] = max(sizes[-1][r], -(-int(real[r // heads]) // unit) * unit)
    totals = [sum(part[r] for part in sizes) for r in range(rows)]
    first = [int(max(totals[b * heads : (b + 1) * heads]) * 1.3) for b in range(batch)]
    at = torch.full((batch, count), -1)
    for b in range(batch):
        kept = torch.ones(count, dtype=torch.bool) if valid is None else valid[b]
        at[b] = first[b] + kept.long().cumsum(0) - 1
    positions = []
    for r in range(rows):
        b = r // heads
        old = torch.randperm(max(first[b], 1), generator=g)[: totals[r] - int(real[b])].sort().values
        new = at[b] if valid is None else at[b][valid[b]]
        positions.append(torch.cat((old, new)).int())
    views, done = [], [0] * rows
    for part, row_sizes in zip(spec.parts, sizes, strict=True):
        pieces = []
        for r, n in enumerate(row_sizes):
            keys = torch.randn(n, spec.head_dim, generator=g) + 0.5
            values = torch.randn(n, spec.value_dim, generator=g)
            pieces.append((keys, values, positions[r][done[r] : done[r] + n]))
            done[r] += n
        views.append(_segment(part, pieces, batch, heads, slack, g))
    states = torch.randn(batch, heads * spec.group, count, spec.head_dim, generator=g).to(dtype)
    if spec.bias:
        views = [replace(v, bias=torch.randn(_places(v), generator=g)) for v in views]
    view = views[0] if len(views) == 1 else MixedView(tuple(views))
    sinks = torch.randn(heads * spec.group, generator=g) * 2 + 1 if spec.sink else None
    return Quantized(spec, view, Queries(states, at, valid, sinks))


def _places(view: Segment) -> torch.Size:
    return view.keys.shape[:3] if isinstance(view, DenseView) else view.keys.shape[:1]


def poison(x: Tensor) -> Tensor:
    """Every number of `x` made one that shows wherever it is used."""
    return (
        x.fill_(POISON_CODE)
        if x.dtype == torch.uint8
        else x.copy_(torch.full_like(x, float("nan"), dtype=torch.float32))
    )


def _segment(
    part: Part, rows: list[tuple[Tensor, Tensor, Tensor]], batch: int, heads: int, slack: int, g: torch.Generator
) -> Segment:
    if part.layout == "dense":
        return _dense(part, rows, batch, heads, slack)
    unit = part.page if part.layout == "paged" else block(part)
    lengths = [len(p) for _, _, p in rows]
    # rooms of whole units, so that groups never cross from one row (or page) into the next
    rooms = [-(-(n + (slack if part.layout == "ragged" else 0)) // unit) * unit for n in lengths]
    starts = [sum(rooms[:i]) for i in range(len(rooms))]
    total = sum(rooms) + unit
    buffers = _buffers(part, total, rows[0][0].shape[1], rows[0][1].shape[1])
    if part.layout == "paged":
        pages = torch.randperm(total // unit, generator=g)
        table = torch.full((len(rows), max(1, *(r // unit for r in rooms)) + 1), 1 << 29, dtype=torch.int32)
    for r, (keys, values, held) in enumerate(rows):
        for j in range(0, len(held), unit):
            stop = min(j + unit, len(held))
            place = starts[r] + j
            if part.layout == "paged":
                page = int(pages[place // unit])
                table[r, j // unit] = page
                place = page * unit
            _write(buffers, part, place, keys[j:stop], values[j:stop], held[j:stop])
    k, ks, v, vs, p = buffers
    counts = torch.tensor(lengths)
    if part.layout == "paged":
        return PagedView(k, v, p, table, lengths, batch, heads, unit, counts, ks, vs)
    begins = torch.tensor(starts)
    return RaggedView(k, v, p, starts, lengths, batch, heads, begins, begins + counts, ks, vs)


def _dense(part: Part, rows: list[tuple[Tensor, Tensor, Tensor]], batch: int, heads: int, slack: int) -> DenseView:
    n = len(rows[0][2])
    room = (n // block(part) + 1) * block(part) + (slack if block(part) == 1 else 0)
    made = []
    for keys, values, held in rows:
        buffers = _buffers(part, room, keys.shape[1], values.shape[1])
        _write(buffers, part, 0, keys, values, held)
        made.append(buffers)

    def stacked(i: int, codec: Codec | None) -> Tensor | None:
        if made[0][i] is None:
            return None
        wide = torch.stack([m[i] for m in made]).unflatten(0, (batch, heads))
        return wide[:, :, : n // codec.group if codec is not None and codec.axis == "channel" else n]

    k, ks, v, vs, p = (stacked(i, c) for i, c in enumerate((None, part.key, None, part.value, None)))
    return DenseView(k, v, p, ks, vs)


def _buffers(
    part: Part, total: int, dim: int, value_dim: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    def pair(codec: Codec, d: int) -> tuple[Tensor, Tensor | None]:
        codes = poison(torch.empty(total, codec.width(d), dtype=dtype_of(codec)))
        if not codec.scaled:
            return codes, None
        shape = (total, codec.parameters, codec.groups(d))
        if codec.axis == "channel":
            shape = (total // codec.group, codec.parameters, d)
        return codes, poison(torch.empty(shape, dtype=torch.float16))

    return *pair(part.key, dim), *pair(part.value, value_dim), torch.full((total,), -7, dtype=torch.int32)


def _write(buffers: tuple, part: Part, place: int, keys: Tensor, values: Tensor, held: Tensor) -> None:
    n = len(held)
    if not n:
        return
    for codec, x, codes, scales in ((part.key, keys, *buffers[:2]), (part.value, values, *buffers[2:4])):
        mine, numbers = encode(x, codec)
        codes[place : place + n] = mine
        if scales is not None:
            step = codec.group if codec.axis == "channel" else 1
            scales[place // step : (place + n) // step] = numbers
    buffers[4][place : place + n] = held


def decoded_error(x: Tensor, codec: Codec) -> Tensor:
    """|x - decode(encode(x))|."""
    codes, scales = encode(x, codec)
    return (decode(codes, scales, codec) - x).abs()
