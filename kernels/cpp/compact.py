"""Compaction in C++: kept entries move as bytes, all arrays of a store in one call; `kernels.compact` says where."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from math import lcm
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels import compact as reference
from kvcompile.kernels.compact import Arrays, CompactSpec, spec_of
from kvcompile.kernels.cpp import build
from kvcompile.kernels.cpp.emit.text import fill
from kvcompile.kernels.pointers import address, opaque

SMALL = 1 << 18  # bytes below which one thread is faster than two
PIECE = 256  # entries of a task, about

SOURCE = """
    // Compaction: kept entries of every row go from $source rows to $target ones, as bytes.
    #include <cstdint>
    #include <cstring>
    #define KV_INLINE static inline __attribute__((always_inline))

    constexpr int ARRAYS = $count;
    struct Call {
      const char* from[ARRAYS];
      char* to[ARRAYS];
      int64_t from_sharing[ARRAYS], to_sharing[ARRAYS];  // rows that are one row of an array (dense ones)
      $before_arguments
      $after_arguments
      int64_t rows, longest;
      const int64_t *kept, *borders, *first;  // of row r kept[borders[r] : borders[r + 1]], to entries first[r] and on
    };

    // Where entry j of row r lies, counted in tokens.
    KV_INLINE int64_t before(const Call& c, int64_t r, int64_t j, int64_t sharing) { return $before; }
    KV_INLINE int64_t after(const Call& c, int64_t r, int64_t j, int64_t sharing) { return $after; }

    // Move the kept ones from number i to `stop` of row r: entries of SIZE bytes, each for TOKENS neighbours.
    template <int ARRAY, int SIZE, int TOKENS>
    KV_INLINE void move(const Call& c, int64_t r, int64_t i, int64_t stop) {
      const int64_t *kept = c.kept + c.borders[r], first = c.first[r];
      const int64_t before_sharing = c.from_sharing[ARRAY], after_sharing = c.to_sharing[ARRAY];
      for (; i < stop; i += TOKENS) {
        const char* x = c.from[ARRAY] + before(c, r, kept[i], before_sharing) / TOKENS * SIZE;
        char* y = c.to[ARRAY] + after(c, r, first + i, after_sharing) / TOKENS * SIZE;
        $copy
      }
    }

    extern "C" void compact(const Call* call, int threads) {
      const Call& c = *call;
      $loop
    }
    """

COPY = "memcpy(y, x, SIZE);"


ELSEWHERE = """
    const int64_t pieces = (c.longest + $piece - 1) / $piece;
    #pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t task = 0; task < c.rows * pieces; task++) {
      const int64_t r = task / pieces, i = task % pieces * $piece, count = c.borders[r + 1] - c.borders[r];
      const int64_t stop = i + $piece < count ? i + $piece : count;
      $arrays
    }
    """

# Kept entries ascend, so that none moves to a higher number and what a copy overwrites has been copied already, or was
# not kept. This holds from the first of a row to its last: one thread moves an array of a row.
IN_PLACE = """
    #pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < c.rows * ARRAYS; task++) {
      const int64_t r = task / ARRAYS, count = c.borders[r + 1] - c.borders[r];
      switch (task % ARRAYS) {
        $arrays
      }
    }
    """

# layout: what a kernel is told of it, and the place of entry j of row r
ARGUMENTS = {
    "dense": "int64_t ${side}_capacity;",
    "ragged": "const int64_t* ${side}_starts;",
    "paged": "const int32_t* ${side}_table;\nint64_t ${side}_pages;",
}
PLACES = {
    "dense": "r / sharing * c.${side}_capacity + j",
    "ragged": "c.${side}_starts[r] + j",
    "paged": "(int64_t)c.${side}_table[r * c.${side}_pages + j / $page] * $page + j % $page",
}


def source(spec: CompactSpec) -> str:
    """The C++ text of a spec."""
    before, after = (_place(spec.source, "from"), _place(spec.target, "to"))
    moves = [f"move<{i}, {size}, {tokens}>" for i, (size, tokens) in enumerate(spec.entries)]
    if spec.in_place:
        arrays = [f"case {i}: {move}(c, r, 0, count); break;" for i, move in enumerate(moves)]
        loop = fill(IN_PLACE, arrays="\n".join(arrays))
    else:
        unit = lcm(*(tokens for _, tokens in spec.entries))
        arrays = [f"{move}(c, r, i, stop);" for move in moves]
        loop = fill(ELSEWHERE, arrays="\n".join(arrays), piece=-(-PIECE // unit) * unit)
    return fill(
        SOURCE,
        source=spec.source,
        target="the same" if spec.in_place else spec.target,
        count=len(moves),
        before_arguments=before[0],
        after_arguments=after[0],
        before=before[1],
        after=after[1],
        copy=COPY if not spec.in_place else f"if (x != y) {COPY}",
        loop=loop,
    )


def _place(layout: str, side: str) -> tuple[str, str]:
    kind = layout.rstrip("0123456789")
    return fill(ARGUMENTS[kind], side=side), fill(PLACES[kind], side=side, page=layout[len(kind) :])


@opaque
def compact(source: Arrays, target: Arrays, kept: Tensor, counts: list[int], first: list[int] | None = None) -> None:
    """Same contract as `kernels.compact.compact`, for arrays on the CPU."""
    if source.learns or target.learns:
        return reference.compact(source, target, kept, counts, first)
    if not kept.numel():
        return
    spec, rows = spec_of(source, target), len(counts)
    borders = torch.tensor([0, *accumulate(counts)], dtype=torch.int64, device="cpu")
    places = torch.tensor(first or [0] * rows, dtype=torch.int64, device="cpu")
    kept = kept.contiguous()
    numbers = [address("entries", x, x.dtype, x.shape) for x in (*source.flat(), *target.flat())]
    numbers += [*source.sharing(rows), *target.sharing(rows), *_where(source, rows), *_where(target, rows)]
    numbers += [rows, max(counts), address("kept entries", kept, torch.int64, (sum(counts),))]
    numbers += [address("borders", borders, torch.int64, (rows + 1,)), address("first", places, torch.int64, (rows,))]
    size = kept.numel() * sum(size // tokens for size, tokens in spec.entries)
    threads = torch.get_num_threads() if size > SMALL else 1
    _kernel(spec)(Struct(f"{len(numbers)}q").pack(*numbers), threads)


def _where(arrays: Arrays, rows: int) -> list[int]:
    """The numbers of ARGUMENTS."""
    table, starts = arrays.table, arrays.starts
    if table is not None:
        return [address("table", table, torch.int32, (rows, table.shape[1]), (1,)), table.stride(0)]
    return [arrays.tensors[0].shape[2]] if starts is None else [address("starts", starts, torch.int64, (rows,))]


@lru_cache(maxsize=256)
def _kernel(spec: CompactSpec) -> Callable[..., Any]:
    function: Any = build.load(source(spec), "compact").compact
    function.argtypes, function.restype = (ctypes.c_char_p, ctypes.c_int), None
    return function  # type: ignore[no-any-return]
