"""Tile lengths, warps, stages and splits: measured ones by device from `tuned.yaml`, else defaults for any device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.triton.forms import Form, key_blocks, power_of_two, rows_for, value_blocks

TABLE = Path(__file__).with_name("tuned.yaml")
TILE_BYTES = 8192  # of one tile of keys: two stages of keys and values stay far below every device's shared memory
STAGED = 65536  # bytes of all stages of keys and values: the shared memory of the smallest target (gfx942)
SUMS = 128 * 128  # numbers of a result that 128 threads sum up: more of them, and others, do not fit their registers
PROGRAMS = 4  # per multiprocessor: what a split aims at
MOST_SPLITS = 64


@dataclass(frozen=True)
class Choice:
    """How a kernel is built and launched. `splits` 0: as many as fill the device."""

    tile: int
    rows: int
    warps: int
    stages: int
    splits: int = 0


def family(spec: KernelSpec, tokens: str) -> str:
    """Specs that are tuned together: `one ragged-int4c32_int4t+ragged-float16 g4 d128`."""
    return f"{tokens} {'+'.join(p.name for p in spec.parts)} g{spec.group} d{spec.head_dim}"


@cache
def table() -> dict[str, dict[str, dict[str, int]]]:
    """`{device name: {family: choice}}`."""
    read: dict[str, Any] = yaml.safe_load(TABLE.read_text("utf-8")) or {}
    return read


def default(spec: KernelSpec, tokens: str) -> Choice:
    """A choice from the sizes alone; nothing was measured for it, but it does not spill (results/triton_aot.md)."""
    widest = max(max(spec.head_dim, spec.value_dim) * max(p.key.bits, p.value.bits, 16) // 8 for p in spec.parts)
    blocks = max(key_blocks(spec).count, value_blocks(spec).count)
    tile = 16 if blocks > 4 else min(64, max(16, power_of_two(TILE_BYTES // widest + 1) // 2))
    entry = max(spec.head_dim * p.key.bits + spec.value_dim * p.value.bits for p in spec.parts) // 8
    stages = 2 if 2 * tile * entry <= STAGED else 1
    if tokens == "one":
        rows = rows_for(spec)
        return Choice(tile, rows, 4 if rows * spec.value_dim <= SUMS else 8, stages)
    wide = max(spec.head_dim, spec.value_dim) > 128
    formats = [c for p in spec.parts for c in (p.key, p.value)]
    narrow = all(c.bits == 16 for c in formats)
    # 8-bit codes come in blocks of all channels, and products in float32 take registers, not tensor cores
    whole = any(c.bits == 32 for c in formats) and any(c.scaled and c.bits == 8 for c in formats)
    rows = 64 if narrow and not wide else 16 if (blocks >= 4 and not narrow) or whole else 32
    return Choice(tile, rows, 8 if wide or whole or blocks == 4 else 4, stages)


def choose(device: str, spec: KernelSpec, tokens: str) -> Choice:
    """The tuned choice for a device name, or the default."""
    tuned = table().get(device, {}).get(family(spec, tokens))
    return Choice(**tuned) if tuned else default(spec, tokens)


def splits(choice: Choice, programs: int, longest: int, processors: int) -> int:
    """How many programs share one row, a power of two: enough to fill the device, none with less than two tiles.

    Args:
        choice: whose `splits`, where set, are taken.
        programs: of the launch with one a row.
        longest: entries of the longest row.
        processors: of the device.
    """
    if choice.splits:
        return choice.splits
    wanted = -(-PROGRAMS * processors // max(programs, 1))
    most = min(MOST_SPLITS, max(1, longest // (2 * choice.tile)))
    return min(power_of_two(wanted), power_of_two(most + 1) // 2)


def form(choice: Choice, tokens: str, count: int, work: str = "attend") -> Form:
    """What the generator needs of a choice."""
    return Form(tokens, choice.rows, choice.tile, count > 1, work)
