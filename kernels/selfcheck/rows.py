"""Random rows of a spec's layout and number formats, with NaN or noise in every place that no kernel may read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompile.kernels.codecs import dtype_of, encode
from kvcompile.kernels.layout import DenseView, MixedView, PagedView, Queries, RaggedView, Segment, View
from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.plan.storage import Codec

UNREAD_CODE, UNREAD_POSITION, NO_PAGE = 0xA5, -7, 1 << 29
SLACK = 3  # places behind each row that belong to none
GAPS = 1.3  # positions there were, for each one that is held


@dataclass(frozen=True)
class Shape:
    """How much is drawn.

    entries: of the longest row in each part, or one group of tokens where that is more. heads: KV heads (1 of latents).
    new: tokens of each sequence. padded: the second half of the sequences has one new token less.
    """

    entries: int
    batch: int = 2
    heads: int = 2
    new: int = 1
    padded: bool = False


@dataclass(frozen=True)
class Sample:
    """What attention over a spec is called with."""

    view: View
    queries: Queries


def draw(spec: KernelSpec, dtype: torch.dtype, shape: Shape, device: torch.device, seed: int = 0) -> Sample:
    """Rows whose true positions ascend with gaps, the new tokens' at their ends, and queries of a dtype.

    Rows of parts that are dense have one length, others may differ. One seed gives the same
    numbers on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = 1 if spec.latent else shape.heads
    rows = shape.batch * heads
    valid = _valid(shape)
    new = [int(valid[r // heads].sum()) for r in range(rows)]
    sizes = _sizes(spec, shape, rows)
    totals = [sum(size[r] for size in sizes) for r in range(rows)]
    first = int(GAPS * max(totals))
    held = [
        torch.randperm(first, generator=generator, dtype=torch.int64, device="cpu")[: n - new[r]].sort().values.int()
        for r, n in enumerate(totals)
    ]
    at = first + valid.long().cumsum(1) - 1
    for r in range(rows):
        held[r] = torch.cat((held[r], at[r // heads][valid[r // heads]].int()))
    views: list[Segment] = []
    begun = [0] * rows
    for part, size in zip(spec.parts, sizes, strict=True):
        pieces = []
        for r, n in enumerate(size):
            keys = _normal(generator, n, spec.head_dim) + 0.5
            values = _normal(generator, n, spec.value_dim)
            pieces.append((keys, values, held[r][begun[r] : begun[r] + n]))
            begun[r] += n
        views.append(_segment(part, pieces, (shape.batch, heads), generator, device))
    if spec.latent:
        views = [replace(view, values=view.keys[..., -spec.value_dim :]) for view in views]
    states = _normal(generator, shape.batch, heads * spec.group, shape.new, spec.head_dim).to(dtype)
    sinks = _normal(generator, heads * spec.group) + 1 if spec.sink else None
    slopes = _normal(generator, heads * spec.group).abs() / 8 if spec.alibi else None
    view = views[0] if len(views) == 1 else MixedView(tuple(views))
    marks = valid.to(device) if shape.padded else None
    sinks, slopes = (None if x is None else x.to(device) for x in (sinks, slopes))
    return Sample(view, Queries(states.to(device), at.to(device), marks, sinks, slopes))


def _normal(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=generator, dtype=torch.float32, device="cpu")


def _valid(shape: Shape) -> Tensor:
    """Which new tokens are real, `[B, Q]`: padding stands in front."""
    valid = torch.ones(shape.batch, shape.new, dtype=torch.bool, device="cpu")
    if shape.padded:
        valid[shape.batch // 2 :, 0] = False
    return valid


def _sizes(spec: KernelSpec, shape: Shape, rows: int) -> list[list[int]]:
    """Entries of each row in each part, in whole groups; the last part has room for the new tokens."""
    sizes = []
    for part in spec.parts:
        unit = _unit(part)
        least = -(-shape.new // unit) * unit
        shorter = 0 if part.layout == "dense" else max(1, shape.entries // (2 * rows))
        sizes.append([max(least, (shape.entries - r * shorter) // unit * unit) for r in range(rows)])
    return sizes


def _unit(part: Part) -> int:
    """Entries that a row of this part is a multiple of."""
    return max(codec.group if codec.axis == "channel" else 1 for codec in (part.key, part.value))


def _segment(
    part: Part,
    rows: Sequence[tuple[Tensor, Tensor, Tensor]],
    shape: tuple[int, int],
    generator: torch.Generator,
    device: torch.device,
) -> Segment:
    """Keys, values and positions of each row in the layout of a part. shape: sequences and heads."""
    unit = part.page if part.layout == "paged" else _unit(part)
    lengths = [len(held) for _, _, held in rows]
    # whole units, so that no group crosses from one row, or page, into the next
    rooms = [-(-(n + (0 if part.layout == "paged" else SLACK)) // unit) * unit for n in lengths]
    places = torch.arange(sum(rooms) + unit, dtype=torch.int64, device="cpu").view(-1, unit)
    if part.layout == "paged":
        places = places[torch.randperm(len(places), generator=generator, dtype=torch.int64, device="cpu")]
    begins = [sum(rooms[:r]) for r in range(len(rows))]
    written = torch.cat([places.flatten()[b : b + n] for b, n in zip(begins, lengths, strict=True)])
    (keys, key_scales), (values, value_scales) = (
        _stored([row[i] for row in rows], codec, written, places.numel(), device)
        for i, codec in enumerate((part.key, part.value))
    )
    positions = torch.full((places.numel(),), UNREAD_POSITION, dtype=torch.int32, device="cpu")
    positions[written] = torch.cat([held for _, _, held in rows])
    positions = positions.to(device)
    if part.layout == "dense":
        return _dense((keys, values, positions, key_scales, value_scales), part, lengths[0], rooms[0], shape)
    counts = torch.tensor(lengths, dtype=torch.int64, device=device)
    if part.layout == "ragged":
        starts = torch.tensor(begins, dtype=torch.int64, device=device)
        borders = starts, starts + counts
        return RaggedView(keys, values, positions, begins, lengths, *shape, *borders, key_scales, value_scales)
    table = torch.full((len(rows), max(rooms) // unit + 1), NO_PAGE, dtype=torch.int32, device="cpu")
    for r, (begin, room) in enumerate(zip(begins, rooms, strict=True)):
        table[r, : room // unit] = places[begin // unit : (begin + room) // unit, 0] // unit
    table = table.to(device)
    return PagedView(keys, values, positions, table, lengths, *shape, unit, counts, key_scales, value_scales)


def _stored(
    rows: list[Tensor], codec: Codec, written: Tensor, total: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Codes and scales of all rows at the places `written`, noise elsewhere."""
    codes, scales = encode(torch.cat(rows), codec)
    room = _unread(torch.empty(total, *codes.shape[1:], dtype=dtype_of(codec), device="cpu"))
    room[written] = codes
    if scales is None:
        return room.to(device), None
    shared = codec.group if codec.axis == "channel" else 1
    numbers = _unread(torch.empty(total // shared, *scales.shape[1:], dtype=scales.dtype, device="cpu"))
    numbers[written[::shared] // shared] = scales
    return room.to(device), numbers.to(device)


def _unread(x: Tensor) -> Tensor:
    """Every number of `x` made one that shows wherever it is used."""
    if x.dtype == torch.uint8:
        return x.fill_(UNREAD_CODE)
    return x.fill_(float("nan"))


def _dense(
    flat: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    part: Part,
    length: int,
    room: int,
    shape: tuple[int, int],
) -> DenseView:
    """Rows of one length as slices of a larger buffer."""

    def sliced(x: Tensor, shared: int = 1) -> Tensor:
        rows = x[: shape[0] * shape[1] * room // shared]
        return rows.view(*shape, room // shared, *x.shape[1:])[:, :, : length // shared]

    def scales(x: Tensor | None, codec: Codec) -> Tensor | None:
        return None if x is None else sliced(x, codec.group if codec.axis == "channel" else 1)

    keys, values, positions, key_scales, value_scales = flat
    numbers = scales(key_scales, part.key), scales(value_scales, part.value)
    return DenseView(sliced(keys), sliced(values), sliced(positions), *numbers)
