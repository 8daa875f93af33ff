"""Weighted sums of a tile of integer codes: sum_t p_t v_t in whole numbers, with p rounded to 16 bits a tile.

sum_t p_t (code_t * scale_t + zero_t) = step * sum_t round(p_t scale_t / step) code_t + sum_t p_t zero_t, where step is
the largest p_t scale_t of the tile by 32767; sums over t are made for each group of channels that has its own scales.

A code of a table of levels is looked up as round(level / unit), unit = max|level| / 16383: off by 2^-15 of the largest
at most, where the levels of `nf4` lie 0.08 of it apart. So that 32 bits hold the sums, step is then at least the sum of
p_t scale_t over the tile by 131008, which matters where many weights are about as large as the largest.
"""

from __future__ import annotations

from math import gcd

from kvcompile.kernels.cpp.emit.address import TILE, Address
from kvcompile.kernels.cpp.emit.decode_values import ACCUMULATORS, split
from kvcompile.kernels.cpp.emit.stored import FixedPoint, Stored
from kvcompile.kernels.cpp.emit.text import fill

RUN = 32  # bytes of an entry that make a register together with those of the next entry
LEVEL = 2**14 - 1  # the largest level of a table
WEIGHTS = 2**31 // (LEVEL + 1) - TILE  # what the weights of a tile may add up to before each is rounded

LARGEST = """
    alignas(64) float scales[TILE];  // the largest of each entry
    for (int t = 0; t < tile.count; t += 16) {
      F x = load(tile.value_numbers + t);
      for (int i = 1; i < $groups; i++) x = max(x, load(tile.value_numbers + i * TILE + t));
      store(scales + t, x);
    }
    """

SIZES = """
    static constexpr int RUNNING = $slots * 16;  // floats of a sum: even bytes and odd ones apart, field after field
    static constexpr int SUMS = RUNNING + $groups * 16;  // and then of sum_t p_t zero_t, for each group of channels
    """

SIZE = """
    static constexpr int SUMS = $slots * 16;  // floats of a sum: even bytes and odd ones apart, field after field
    """

ROUNDED = """
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
    """

ROUNDED_LEVELS = """
    F most = zero(), total = zero();
    for (int t = 0; t < tile.count; t += 16) {
      F x = load(p[g] + t) * load($largest + t);
      most = max(most, x), total += x;
    }
    float all = ::sum(total), unit = fmaxf(largest(most) * (1.0f / 32767), all * (1.0f / $room)) + 0 * all;
    float steps = unit > 1e-34f ? 1 / unit : 0;
    step[g] = unit * $level;
    for (int i = 0; i < $groups; i++)
      for (int t = 0; t < tile.count; t += 16) {
        F x = load(p[g] + t) * set(steps) * load(tile.value_numbers + i * TILE + t);
        store_whole<false>(weights[i][g] + t, whole(x));
      }
    """

VALUES = """
    $sizes
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
                C codes = $codes;
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
        $rounded
      }
      add<G, 0>(row, tile, weights[0][0], step, tile.count, sum[0]);
    }
    KV_INLINE void finish(const float* sum, float* result) {
      for (int c = 0; c < $runs; c++)
        for (int piece = 0; piece < $pieces; piece++) {
          const float *even = sum + (c * $all_fields + piece) * 16, *odd = even + $pieces * 16;
          $bias
          store_zipped(result + piece * $width + c * $lanes, load(even)$plus, load(odd)$plus, $lanes);
        }
    }
    """


def takes(value: Stored) -> bool:
    """Whether values are summed as whole numbers: scales of a channel leave no step that its tokens share."""
    return value.whole and value.codec.axis == "token"


def fixed_point(value: Stored) -> FixedPoint | None:
    """The levels of a table as they are multiplied; None where there are none, or they stay floats."""
    return FixedPoint(value.table, LEVEL) if value.table and takes(value) else None


def values(where: Address, group: int) -> str:
    """`accumulate` for a tile and `finish`, which puts the sums `[DV]` in the order of the channels."""
    value = where.value
    lanes, groups, all_fields = _lanes(value), value.codec.groups(value.dim), 16 // value.codec.bits
    runs, fields = value.width // lanes, min(4, all_fields)
    most = max(1, ACCUMULATORS // (split(group) * fields))
    shared = value.codec.group or value.dim
    of = f"((AT / {value.codec.bits} + f) % {value.pieces} * {value.width} + (first + c) * {lanes}) / {shared}"
    group_of = f" + (piece * {value.width} + c * {lanes}) / {shared} * 16" if groups > 1 else ""
    return fill(
        VALUES,
        sizes=fill(SIZES if value.zeros else SIZE, slots=runs * all_fields, groups=groups),
        groups=groups,
        scales=fill(LARGEST, groups=groups) if groups > 1 else "",
        rounded=_rounded(value),
        columns=max(n for n in range(1, runs + 1) if runs % n == 0 and n <= most),
        fields=fields,
        bits=value.codec.bits,
        codes=value.fields("x", f"AT + f * {value.codec.bits}", fixed_point(value)),
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
        bias=f"F bias = set(::sum(load(sum + RUNNING{group_of})));" if value.zeros else "",
        plus=" + bias" if value.zeros else "",
    )


def _rounded(value: Stored) -> str:
    """Weights times scales of a tile as whole numbers, and what the weights add of zeros."""
    groups = value.codec.groups(value.dim)
    largest = "scales" if groups > 1 else "tile.value_numbers"
    fixed = fixed_point(value)
    if fixed is None:
        return fill(ROUNDED, groups=groups, largest=largest)
    return fill(ROUNDED_LEVELS, groups=groups, largest=largest, room=WEIGHTS, level=fixed.unit)


def _lanes(value: Stored) -> int:
    """Bytes of a run: as many as fit, divide the entry and share their scale."""
    within = gcd(value.width, value.codec.group) if value.scales == "groups" else value.width
    return max(n for n in range(1, RUN + 1) if within % n == 0)
