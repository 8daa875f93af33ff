"""Weighted sums of a tile of integer codes: sum_t p_t v_t in whole numbers, with p rounded to 16 bits a tile.

sum_t p_t (code_t * scale_t + zero_t) = step * sum_t round(p_t scale_t / step) code_t + sum_t p_t zero_t, where step is
the largest p_t scale_t of the tile by 32767; sums over t are made for each group of channels that has its own scales.
"""

from __future__ import annotations

from math import gcd

from kvcompile.kernels.cpp.emit.address import Address
from kvcompile.kernels.cpp.emit.decode_values import ACCUMULATORS, split
from kvcompile.kernels.cpp.emit.stored import Stored
from kvcompile.kernels.cpp.emit.text import fill

RUN = 32  # bytes of an entry that make a register together with those of the next entry

LARGEST = """
    alignas(64) float scales[TILE];  // the largest of each entry
    for (int t = 0; t < tile.count; t += 16) {
      F x = load(tile.value_numbers + t);
      for (int i = 1; i < $groups; i++) x = max(x, load(tile.value_numbers + i * TILE + t));
      store(scales + t, x);
    }
    """

VALUES = """
    static constexpr int RUNNING = $slots * 16;  // floats of a sum: even bytes and odd ones apart, field after field
    static constexpr int SUMS = RUNNING + $groups * 16;  // and then of sum_t p_t zero_t, for each group of channels
    #if defined(KV_AVX512)
    static constexpr int COLUMNS = $columns, FIELDS = $fields;  // runs of bytes and fields of bits at a time
    #else
    static constexpr int COLUMNS = 1, FIELDS = 2;
    #endif
    // sum[g] += step[g] * sum_t p[g][t] code[t] for 0 <= t < count, in fields of $bits bits from bit AT on
    template <int R, int AT>
    KV_INLINE void add(const Row& row, const Tile& tile, const int16_t* p, const float* step, int count, float* sum) {
      if constexpr (R > ROWS) {
        add<ROWS, AT>(row, tile, p, step, count, sum);
        add<R - ROWS, AT>(row, tile, p + ROWS * TILE, step + ROWS, count, sum + ROWS * SUMS);
      } else {
        for (int first = 0; first < $runs; first += COLUMNS) {
          I o[R][COLUMNS][FIELDS] = {};
          for (int t = 0; t < count; t += 2) {
            int e = least(t + 1, count - 1);  // its weight is zero where there is no such entry
            const uint8_t* v = row.values + $entry * $step;
            const uint8_t* w = row.values + $other * $step;
            ahead(row.values + $later * $step$column, $bytes);
            ahead(row.values + $later_other * $step$column, $bytes);
            UNROLL for (int c = 0; c < COLUMNS; c++) {
              C x = held(zipped<$lanes>(v + (first + c) * $lanes, w + (first + c) * $lanes));
              UNROLL for (int f = 0; f < FIELDS; f++) {
                C codes = field(x, AT + f * $bits, $bits);
                $group
                UNROLL for (int g = 0; g < R; g++) o[g][c][f] = dot(o[g][c][f], codes, two(p + $weights + t));
              }
            }
          }
          UNROLL for (int g = 0; g < R; g++)
            UNROLL for (int c = 0; c < COLUMNS; c++) {
              UNROLL for (int f = 0; f < FIELDS; f++) {
                float* to = sum + g * SUMS + ((first + c) * $all_fields + AT / $bits + f) * 16;
                store(to, mul_add(to_float(o[g][c][f]), set(step[g]), load(to)));
              }
            }
        }
        if constexpr (AT + FIELDS * $bits < 16) add<R, AT + FIELDS * $bits>(row, tile, p, step, count, sum);
      }
    }
    KV_INLINE void accumulate(const Row& row, const Tile& tile, float (&p)[G][STRIDE], float (&sum)[G][SUMS]) {
      alignas(64) int16_t weights[$groups][G][TILE];  // p times scale, for each group of channels
      float step[G];
      $scales
      for (int g = 0; g < G; g++) {
        F most = zero();
        for (int t = 0; t < tile.count; t += 16) most = max(most, load(p[g] + t) * load($largest + t));
        float top = largest(most), steps = top > 1e-30f ? 32767 / top : 0;
        step[g] = top * (1.0f / 32767);
        for (int i = 0; i < $groups; i++) {
          F zero = load(sum[g] + RUNNING + 16 * i);
          for (int t = 0; t < tile.count; t += 16) {
            F x = load(p[g] + t);
            zero = mul_add(x, load(tile.value_numbers + ($groups + i) * TILE + t), zero);
            store_whole<false>(weights[i][g] + t, whole(x * set(steps) * load(tile.value_numbers + i * TILE + t)));
          }
          store(sum[g] + RUNNING + 16 * i, zero);
        }
      }
      add<G, 0>(row, tile, weights[0][0], step, tile.count, sum[0]);
    }
    KV_INLINE void finish(const float* sum, float* result) {
      for (int c = 0; c < $runs; c++)
        for (int piece = 0; piece < $pieces; piece++) {
          const float *even = sum + (c * $all_fields + piece) * 16, *odd = even + $pieces * 16;
          F bias = set(::sum(load(sum + RUNNING$group_of)));
          store_zipped(result + piece * $width + c * $lanes, load(even) + bias, load(odd) + bias, $lanes);
        }
    }
    """


def values(where: Address, group: int) -> str:
    """`accumulate` for a tile and `finish`, which puts the sums `[DV]` in the order of the channels."""
    value = where.value
    lanes, groups, all_fields = _lanes(value), value.codec.groups(value.dim), 16 // value.codec.bits
    runs, fields = value.width // lanes, min(4, all_fields)
    most = max(1, ACCUMULATORS // (split(group) * fields))
    shared = value.codec.group or value.dim
    of = f"((AT / {value.codec.bits} + f) % {value.pieces} * {value.width} + (first + c) * {lanes}) / {shared}"
    return fill(
        VALUES,
        slots=runs * all_fields,
        groups=groups,
        scales=fill(LARGEST, groups=groups) if groups > 1 else "",
        largest="scales" if groups > 1 else "tile.value_numbers",
        columns=max(n for n in range(1, runs + 1) if runs % n == 0 and n <= most),
        fields=fields,
        bits=value.codec.bits,
        runs=runs,
        entry=where.entry("t"),
        other=where.entry("e"),
        later=where.later("t"),
        later_other=where.later("t + 1"),
        step=where.value_step,
        column=f" + first * {lanes}" if runs > 1 else "",
        bytes=f"COLUMNS * {lanes}",
        lanes=lanes,
        group=f"const int group = {of};" if groups > 1 else "",
        weights="(group * G + g) * TILE" if groups > 1 else "g * TILE",
        all_fields=all_fields,
        pieces=value.pieces,
        width=value.width,
        group_of=f" + (piece * {value.width} + c * {lanes}) / {shared} * 16" if groups > 1 else "",
    )


def _lanes(value: Stored) -> int:
    """Bytes of a run: as many as fit, divide the entry and share their scale."""
    within = gcd(value.width, value.codec.group) if value.scales == "groups" else value.width
    return max(n for n in range(1, RUN + 1) if within % n == 0)
