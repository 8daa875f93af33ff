"""Compactions in every layout and number format, with noise in all memory: whoever reads or writes too much shows."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import product
from math import lcm, prod

import torch
from torch import Tensor

from kvcompile.kernels.compact import Arrays, Compactor, CompactSpec, spec_of

PAGE = 16
# arrays of a store, positions left out: dtype, shape of an entry, tokens that share it
FORMATS: dict[str, list[tuple[torch.dtype, tuple[int, ...], int]]] = {
    "float32": [(torch.float32, (64,), 1)] * 2,
    "float16": [(torch.float16, (80,), 1)] * 2,
    "bfloat16": [(torch.bfloat16, (128,), 1), (torch.bfloat16, (24,), 1)],
    "float64": [(torch.float64, (12,), 1)] * 2,
    "latent": [(torch.float32, (72,), 1)],
    "int8": [(torch.uint8, (64,), 1), (torch.float16, (2, 1), 1)] * 2,
    "float8": [(torch.float8_e4m3fn, (64,), 1), (torch.float16, (1, 1), 1)] * 2,
    "int4": [(torch.uint8, (32,), 1), (torch.float16, (2, 64), 16), (torch.uint8, (32,), 1), (torch.float16, (4,), 1)],
    "int2": [(torch.uint8, (5,), 1), (torch.float16, (2, 20), 8), (torch.uint8, (5,), 1), (torch.float16, (2, 20), 4)],
}
# source and target; the last two in place
WAYS = [("dense", "dense"), ("dense", "ragged"), ("ragged", "ragged"), ("ragged", "paged"), ("dense", "paged")]
WAYS += [("paged", "ragged"), ("paged", "paged"), ("ragged", ""), ("paged", "")]
CASES = list(product(FORMATS, WAYS))
# for those that must be compiled: every format in every layout somewhere, and the one with everything in all of them
FEW = [(f, w) for i, f in enumerate(FORMATS) for j, w in enumerate(WAYS) if (i + j) % 3 == 0 or f == "int4"]


@dataclass(frozen=True)
class Move:
    """A call of a compactor, and the arrays of the target as they must be afterwards."""

    source: Arrays
    target: Arrays
    kept: Tensor
    counts: list[int]
    first: list[int]
    expected: list[Tensor]

    @property
    def spec(self) -> CompactSpec:
        """The kernel that it needs."""
        return spec_of(self.source, self.target)


def check(compactor: Compactor, move: Move) -> None:
    """The compactor leaves the expected bytes everywhere, and the source as it was."""
    before = [x.clone() for x in move.source.tensors]
    compactor(move.source, move.target, move.kept, move.counts, move.first)
    for got, want in zip(move.target.tensors, move.expected, strict=True):
        assert torch.equal(_bytes(got), _bytes(want))
    if not move.spec.in_place:
        for now, old in zip(move.source.tensors, before, strict=True):
            assert torch.equal(_bytes(now), _bytes(old))


def case(name: str, way: tuple[str, str], seed: int, longest: int = 70) -> Move:
    """Rows of random lengths, none, one token and whole pages among them; of each all, none or some entries stay."""
    draw, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    arrays = [*FORMATS[name], (torch.int32, (), 1)]  # true positions
    unit = lcm(*(tokens for *_, tokens in arrays))
    batch, heads = draw.choice([(1, 1), (1, 3), (2, 2)])
    sizes = (0, 1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, longest)
    lengths = [-(-draw.choice(sizes) // unit) * unit for _ in range(batch * heads)]
    kept = [_some(n // unit, unit, draw) for n in lengths]
    counts = [len(x) for x in kept]
    source = _arrays(way[0], arrays, batch, heads, lengths, unit, draw, noise, shared=draw.random() < 0.5)
    first = [0] * len(counts)
    target = source
    if way[1]:
        first = [draw.choice((0, 0, 1, 3)) * unit for _ in counts]
        stops = [start + n for start, n in zip(first, counts, strict=True)]
        target = _arrays(way[1], arrays, batch, heads, stops, unit, draw, noise, shared=False)
    entries = torch.tensor([j for row in kept for j in row], dtype=torch.long)
    move = Move(source, target, entries, counts, first, [])
    return replace(move, expected=_expected(move, kept, heads))


def _some(groups: int, unit: int, draw: random.Random) -> list[int]:
    share = draw.choice((0.0, 0.2, 0.5, 0.9, 1.0))
    begin = draw.choice((0, 0, groups // 2))
    return [g * unit + k for g in range(groups) if g < begin or draw.random() < share for k in range(unit)]


def _noise(dtype: torch.dtype, shape: tuple[int, ...], noise: torch.Generator) -> Tensor:
    size = prod(shape) * torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=noise).view(dtype).view(shape)


def _arrays(
    layout: str,
    arrays: list[tuple[torch.dtype, tuple[int, ...], int]],
    batch: int,
    heads: int,
    lengths: list[int],
    unit: int,
    draw: random.Random,
    noise: torch.Generator,
    shared: bool,
) -> Arrays:
    """Room for rows of these lengths; shared: heads share positions (dense)."""
    tokens = tuple(n for *_, n in arrays)
    if layout == "dense":
        room = max(lengths) + draw.choice((0, 2)) * unit
        made = [
            _noise(dtype, (batch, 1 if shared and not shape else heads, room // n, *shape), noise)
            for dtype, shape, n in arrays
        ]
        return Arrays(tuple(made), tokens)
    if layout == "ragged":
        rooms = [n + draw.choice((0, 1, 3)) * unit for n in lengths]
        order = draw.sample(range(len(rooms)), len(rooms))
        starts = [sum(rooms[o] for o in order[: order.index(r)]) for r in range(len(rooms))]
        made = [_noise(dtype, (sum(rooms) // n, *shape), noise) for dtype, shape, n in arrays]
        return Arrays(tuple(made), tokens, starts=torch.tensor(starts))
    needed = [-(-n // PAGE) for n in lengths]
    pages = draw.sample(range(sum(needed) + 3), sum(needed))
    table = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)
    for r, n in enumerate(needed):
        table[r, :n] = torch.tensor([pages.pop() for _ in range(n)], dtype=torch.int32)
    made = [_noise(dtype, ((sum(needed) + 3) * PAGE // n, *shape), noise) for dtype, shape, n in arrays]
    return Arrays(tuple(made), tokens, table=table, page=PAGE)


def _expected(move: Move, kept: list[list[int]], heads: int) -> list[Tensor]:
    """One entry after the other, as the docstring of `Arrays` says."""
    out = []
    for i, n in enumerate(move.source.tokens):
        old, new = move.source.tensors[i], move.target.tensors[i].clone()
        for r, row in enumerate(kept):
            for k in range(0, len(row), n):
                new[_place(move.target, i, r, move.first[r] + k, heads)] = old[_place(move.source, i, r, row[k], heads)]
        out.append(new)
    return out


def _place(arrays: Arrays, i: int, r: int, j: int, heads: int) -> tuple[int, ...]:
    tokens = arrays.tokens[i]
    if arrays.table is not None:
        return ((int(arrays.table[r, j // PAGE]) * PAGE + j % PAGE) // tokens,)
    if arrays.starts is not None:
        return ((int(arrays.starts[r]) + j) // tokens,)
    return r // heads, r % heads if arrays.tensors[i].shape[1] > 1 else 0, j // tokens


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
