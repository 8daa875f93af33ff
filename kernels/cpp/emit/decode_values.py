"""Weighted sums of a tile of stored values: sum_t p_t v_t, with the scales folded into whatever is touched least.

Scales of a token multiply its weight, once for each group of channels; those of a channel decode values in registers.
Whole numbers with scales of a token have their own: `integer_values`.
"""

from __future__ import annotations

from math import ceil

from kvcompile.kernels.cpp.emit.address import Address
from kvcompile.kernels.cpp.emit.stored import Stored
from kvcompile.kernels.cpp.emit.text import fill

ROWS, ACCUMULATORS = 4, 24  # of the 32 vector registers of AVX-512; a CPU with fewer takes a run at a time

ADD = """
    // sum[g] += p[g][t] v[t] for start <= t < stop, COLUMNS runs of channels at a time
    template <int R> KV_INLINE void add(const Row& row, const Tile& tile, const float* p, int start, int stop,
                                        float* sum$scales_in) {
      if constexpr (R > ROWS) {
        add<ROWS>(row, tile, p, start, stop, sum$scales_on);
        add<R - ROWS>(row, tile, p + ROWS * STRIDE, start, stop, sum + ROWS * SUMS$scales_on);
      } else {
        for (int first = 0; first < $runs; first += COLUMNS) {
          F o[R][COLUMNS][$pieces];
          UNROLL for (int g = 0; g < R; g++)
            UNROLL for (int c = 0; c < COLUMNS; c++) {
              $fetch
            }
          $unroll
          for (int t = start; t < stop; t++) {
            const $element* v = row.values + $entry * $step;
            ahead(row.values + $later * $step$column, $bytes);
            UNROLL for (int c = 0; c < COLUMNS; c++) {
              $loads
              UNROLL for (int g = 0; g < R; g++) {
                $products
              }
            }
          }
          UNROLL for (int g = 0; g < R; g++)
            UNROLL for (int c = 0; c < COLUMNS; c++) {
              $keep
            }
        }
      }
    }
    """

COLUMNS = """
    #if defined(KV_AVX512)
    static constexpr int COLUMNS = $columns;
    #else
    static constexpr int COLUMNS = 1;
    #endif
    """

VALUES = """
    static constexpr int SUMS = $slots * 16;  // floats of a sum, in the order of the stored codes
    $columns
    $add
    KV_INLINE void accumulate(const Row& row, const Tile& tile, float (&p)[G][STRIDE], float (&sum)[G][SUMS]) {
      $body
    }
    KV_INLINE void finish(const float* sum, float* result) {
      for (int c = 0; c < $runs; c++) {
        $stores
      }
    }
    """

TOKEN = """
    alignas(64) float weights[$groups][G][STRIDE];  // p times scale, for each group of channels
    for (int i = 0; i < $groups; i++)
      for (int g = 0; g < G; g++)
        for (int t = 0; t < tile.count; t += 16)
          store(weights[i][g] + t, load(p[g] + t) * load(tile.value_numbers + i * TILE + t));
    add<G>(row, tile, weights[0][0], 0, tile.count, sum[0]);
    """

CHANNEL = """
    for (int start = 0, stop; start < tile.count; start = stop) {
      stop = least(tile.count, start + $group - (tile.from + start) % $group);
      const fp16* from = row.value_scales + $index * $step;
      alignas(64) float scales[$total];
      for (int c = 0; c < $runs; c++) {
        $stores
      }
      add<G>(row, tile, p[0], start, stop, sum[0], scales);
    }
    """


def split(group: int) -> int:
    """Query heads whose sums stay in registers together, at most."""
    return ceil(group / ceil(group / ROWS))


def _columns(stored: Stored, group: int) -> int:
    """Runs of channels whose sums stay in registers together: measured, by what a run needs to be decoded."""
    if stored.pieces > 1:
        return 1
    most = 2 if stored.element == "float" else ACCUMULATORS // split(group)
    return max(n for n in range(1, stored.runs + 1) if stored.runs % n == 0 and n <= max(1, most))


def values(where: Address, group: int) -> str:
    """`accumulate` for a tile and `finish`, which puts the sums `[DV]` in the order of the channels."""
    value = where.value
    body = "add<G>(row, tile, p[0], 0, tile.count, sum[0]);"
    if value.codec.axis == "token":
        body = fill(TOKEN, groups=value.codec.groups(value.dim))
    elif value.scales == "channel":
        body = _channel(where)
    count, columns = "" if value.lanes == 16 else f", {value.lanes}", _columns(value, group)
    stores = [
        f"store(result + {value.channel(i, 'c')}, load(sum + {value.slot(i, 'c')}){count});"
        for i in range(value.pieces)
    ]
    return fill(
        VALUES,
        slots=value.slots,
        columns=fill(COLUMNS, columns=columns) if columns > 1 else "static constexpr int COLUMNS = 1;",
        add=_add(where),
        body=body,
        runs=value.runs,
        stores="\n".join(stores),
    )


def _add(where: Address) -> str:
    value = where.value
    channel = value.scales == "channel"
    run = "(first + c)"
    vectors = value.decoded("v", run, "scales") if channel else value.codes("v", run)
    products = []
    for i in range(value.pieces):
        group = f"({value.group(i, run)} * G + g)" if value.scales == "groups" else "g"
        products.append(f"o[g][c][{i}] = mul_add(set(p[{group} * STRIDE + t]), x{i}, o[g][c][{i}]);")
    return fill(
        ADD,
        scales_in=", const float* scales" if channel else "",
        scales_on=", scales" if channel else "",
        runs=value.runs,
        pieces=value.pieces,
        element=value.element,
        unroll='_Pragma("GCC unroll 4")' if value.pieces > 1 else "",
        entry=where.entry("t"),
        later=where.later("t"),
        column=f" + first * {value.lanes}" if value.runs > 1 else "",
        bytes=f"COLUMNS * {value.lanes} * sizeof({value.element})",
        step=where.value_step,
        fetch="\n".join(
            f"o[g][c][{i}] = load(sum + g * SUMS + {value.slot(i, '(first + c)')});" for i in range(value.pieces)
        ),
        loads="\n".join(f"F x{i} = held({x});" for i, x in enumerate(vectors)),
        products="\n".join(products),
        keep="\n".join(
            f"store(sum + g * SUMS + {value.slot(i, '(first + c)')}, o[g][c][{i}]);" for i in range(value.pieces)
        ),
    )


def _channel(where: Address) -> str:
    value = where.value
    arrays = ("from", "from + DV")[: value.codec.parameters]
    stores = [
        f"store(scales + {f'{k * value.slots * 16} + ' if k else ''}{value.slot(i, 'c')}, {value.part(x, i, 'c')});"
        for i in range(value.pieces)
        for k, x in enumerate(arrays)
    ]
    return fill(
        CHANNEL,
        group=value.codec.group,
        index=where.group(value, "start"),
        step=f"{value.codec.parameters} * DV",
        total=value.codec.parameters * value.slots * 16,
        runs=value.runs,
        stores="\n".join(stores),
    )
