"""Logits of a tile of integer codes: q . k in whole numbers, with q rounded to 16 bits; scales as in `decode_keys`.

q . (code * scale + zero) = step * scale * (round(q / step) . code) + zero * sum(q), where step = max|q| / 32767: each
channel is off by 2^-16 of the largest at most, some hundred times less than 8-bit codes are.

A code of a table of levels is looked up as round(level / unit), unit = max|level| / limit, and q has the same limit: as
much as 32 bits hold of the sum over the channels that share a scale. For 64 channels the limit is 11585, for 512 it
is 4095: a level is off by 2^-14.5 (2^-13) of the largest at most, where the levels of `nf4` lie 0.08 of it apart.
"""

from __future__ import annotations

from math import isqrt

from kvcompile.kernels.cpp.emit.address import Address
from kvcompile.kernels.cpp.emit.stored import FixedPoint, Stored
from kvcompile.kernels.cpp.emit.text import fill

QUESTION = """
    static constexpr int KEY = $slots * 16;  // numbers of a query, in the order of the stored codes
    struct Question {
      alignas(64) int16_t q[G][KEY];
      float step[G]$sums
    };
    KV_INLINE void arrange(const Query* states, Question& to, int g) {
      F x[$slots]$total;
      UNROLL for (int c = 0; c < $runs; c++) {
        $loads
      }
      to.step[g] = to_whole<$limit>(x, to.q[g])$unit;
      $totals
    }
    """

TOTALS = """
    float steps = to.step[g] > 0 ? 1 / to.step[g] : 0;
    UNROLL for (int c = 0; c < $runs; c++) {
      $totals
    }
    for (int i = 0; i < $groups; i++) to.sum[g][i] = sum(total[i]) * to.step[g];
    """

DOTS = """
    #if defined(KV_AVX512)
    static constexpr int BLOCKS = 4;  // of four entries each, whose products wait for one load of the query
    #else
    static constexpr int BLOCKS = 1;
    #endif
    // s[g][t] = q[g] . k[t] for start <= t < stop, sixteen entries at a time (past the end the last one again): the
    // blocks of a register are entries j, j + 4, j + 8 and j + 12, so that the transposing sum leaves them in order.
    template <int R>
    KV_INLINE void dots(const Row& row, const Tile& tile, const int16_t* q, const float* step$added_in,
                        int start, int stop, float* s) {
      if constexpr (R > ROWS) {
        dots<ROWS>(row, tile, q, step$added, start, stop, s);
        dots<R - ROWS>(row, tile, q + ROWS * KEY, step + ROWS$added_on, start, stop, s + ROWS * STRIDE);
      } else {
        for (int t = start; t < stop; t += 16) {
          asm("" : "+r"(q));  // or the compiler spreads all of it to registers ahead, and those to memory
          const uint8_t* k[16];
          UNROLL for (int i = 0; i < 16; i++) {
            int e = least(t + i, stop - 1);
            k[i] = row.keys + $entry * $width;
            ahead(row.keys + $later * $width, $width);
          }
          $body
        }
      }
    }
    """

PRODUCTS = """
    I sum[R][4] = {};
    UNROLL for (int first = 0; first < 4; first += BLOCKS)
      UNROLL for (int c = 0; c < $runs; c++) {
        C x[BLOCKS], codes[BLOCKS];
        UNROLL for (int b = 0; b < BLOCKS; b++) {
          const uint8_t** of = k + first + b;
          x[b] = held(four<$lanes>(of[0] + c * $lanes, of[4] + c * $lanes, of[8] + c * $lanes, of[12] + c * $lanes));
        }
        UNROLL for (int f = 0; f < $fields; f++) {  // field after field, of even bytes and then of odd ones
          const int piece = f % $pieces;
          $skip
          UNROLL for (int b = 0; b < BLOCKS; b++) codes[b] = held($codes);
          UNROLL for (int g = 0; g < R; g++) {
            C numbers = held(four(q + g * KEY + (piece * $runs + c) * 16 + f / $pieces * 8));
            UNROLL for (int b = 0; b < BLOCKS; b++) sum[g][first + b] = dot(sum[g][first + b], codes[b], numbers);
          }
        }
      }
    UNROLL for (int g = 0; g < R; g++) {
      F x = sum16(to_float(sum[g][0]), to_float(sum[g][1]), to_float(sum[g][2]), to_float(sum[g][3])) * set(step[g]);
      $keep
    }
    """

TOKEN = """
    F scale = load(tile.key_numbers + t)$zero;
    $products
    """

GROUPS = """
    F logit[R] = {};
    UNROLL for (int n = 0; n < $groups; n++) {
      F scale = load(tile.key_numbers + n * TILE + t)$zero;
      $products
    }
    UNROLL for (int g = 0; g < R; g++) store(s + g * STRIDE + t, logit[g]);
    """

LOGITS = """
    KV_INLINE void logits(const Row& row, const Tile& tile, const Question& q, float (&s)[G][STRIDE]) {
      dots<G>(row, tile, q.q[0], q.step$sum, 0, tile.count, s[0]);
    }
    """

CHANNEL = """
    static constexpr int KEY = $key;  // numbers of a query, in the order of the stored codes
    struct Question {
      alignas(64) int16_t q[G][KEY];
      $channels
      float step[G];
    };
    KV_INLINE void arrange(const Query* states, Question& to, int g) {
      F x[$slots];
      UNROLL for (int c = 0; c < $runs; c++) {
        $loads
      }
      to.step[g] = to_whole<$limit>(x, to.q[g])$unit;
      $keep
    }
    $dots
    // The same with the scales of $group consecutive entries, whole numbers too, folded into the query
    KV_INLINE void logits(const Row& row, const Tile& tile, const Question& q, float (&s)[G][STRIDE]) {
      for (int start = 0, stop; start < tile.count; start = stop) {
        stop = least(tile.count, start + $group - (tile.from + start) % $group);
        const fp16* from = row.key_scales + $index * $step;
        F x[$slots];
        UNROLL for (int c = 0; c < $runs; c++) {
          $scales
        }
        alignas(64) int16_t scales[KEY], folded[G][KEY];
        float unit = to_whole<32767>(x, scales), step[G]$bias
        $zeros
        for (int g = 0; g < G; g++) {
          for (int i = 0; i < KEY; i += 32) scaled(q.q[g] + i, scales + i, folded[g] + i);
          $total
          step[g] = q.step[g] * unit * 32768;
          $sum
        }
        dots<G>(row, tile, folded[0], step$added, start, stop, s[0]);
      }
    }
    """

ZEROS = """
    UNROLL for (int c = 0; c < $runs; c++) {
      $zeros
    }
    """

BIAS = """
    F total = zero();
    UNROLL for (int i = 0; i < $slots; i++) total = mul_add(load(q.channels[g] + i * 16), x[i], total);
    """


def logits(where: Address) -> str:
    """`arrange` for the queries and `logits` for a tile."""
    if where.key.scales == "channel":
        return _channel(where)
    sums = ", q.sum[0]" if where.key.zeros else ""
    return "\n".join((_question(where.key), _dots(where), fill(LOGITS, sum=sums)))


def _limit(key: Stored) -> int:
    """The most that a query's number may be: 16 bits hold it, and 32 bits the products of a lane, four of each run.

    Of a table: that a level's may be as well. Groups are summed apart.
    """
    if key.table:
        slots = key.slots if key.scales == "channel" else (key.codec.group or key.dim) // key.lanes
        return min(2**15 - 1, isqrt((2**29 - 1) // slots))
    most_code = (1 << key.codec.bits) - 1
    return min(2**15 - 1, 2**29 // (key.slots * most_code))


def fixed_point(key: Stored) -> FixedPoint | None:
    """The levels of a table as they are multiplied; None where there are none, or they stay floats."""
    return FixedPoint(key.table, _limit(key)) if key.table and key.whole else None


def _unit(key: Stored) -> str:
    """What goes into the step of a query for the levels of a table."""
    fixed = fixed_point(key)
    return f" * {fixed.unit}" if fixed else ""


def _channel(where: Address) -> str:
    key = where.key
    return fill(
        CHANNEL,
        key=-(-key.slots // 2) * 32,
        slots=key.slots,
        runs=key.runs,
        loads=_vectors(key, "states", " * set(QUERY_SCALE)"),
        dots=_dots(where),
        group=key.codec.group,
        index=where.group(key, "start"),
        step=f"{key.codec.parameters} * D",
        scales=_vectors(key, "from"),
        limit=_limit(key),
        unit=_unit(key),
        **_biases(key),
    )


def _biases(key: Stored) -> dict[str, str]:
    """What zeros of channels add: `q . zero`."""
    if not key.zeros:
        return {"channels": "", "keep": "", "bias": ";", "zeros": "", "total": "", "sum": "", "added": ""}
    return {
        "channels": "alignas(64) float channels[G][KEY];",
        "keep": f"for (int i = 0; i < {key.slots}; i++) store(to.channels[g] + i * 16, x[i]);",
        "bias": ", bias[G];  // bias: q . zero",
        "zeros": fill(ZEROS, runs=key.runs, zeros=_vectors(key, "from + D")),
        "total": fill(BIAS, slots=key.slots),
        "sum": "bias[g] = sum(total);",
        "added": ", bias",
    }


def _vectors(key: Stored, array: str, times: str = "") -> str:
    """`x[slot]`: the channels of an array, run `c`."""
    return "\n".join(f"{_slot(key, i)} = {key.part(array, i, 'c')}{times};" for i in range(key.pieces))


def _slot(key: Stored, piece: int) -> str:
    return f"x[{piece * key.runs} + c]" if piece else "x[c]"


def _question(key: Stored) -> str:
    totals = [
        f"total[{key.group(i, 'c')}] += to_float(whole({_slot(key, i)} * set(steps)));" for i in range(key.pieces)
    ]
    groups = key.codec.groups(key.dim)
    return fill(
        QUESTION,
        slots=key.slots,
        limit=_limit(key),
        runs=key.runs,
        loads=_vectors(key, "states", " * set(QUERY_SCALE)"),
        sums=f", sum[G][{groups}];  // sums of channels, by group" if key.zeros else ";",
        total=f", total[{groups}] = {{}}" if key.zeros else "",
        totals=fill(TOTALS, runs=key.runs, groups=groups, totals="\n".join(totals)) if key.zeros else "",
        unit=_unit(key),
    )


def _dots(where: Address) -> str:
    key = where.key
    added, by = "bias" if key.scales == "channel" else "total", ""
    if key.scales == "groups":
        by = f" * {key.codec.groups(key.dim)}"
    return fill(
        DOTS,
        added_in=f", const float* {added}" if key.zeros else "",
        added=f", {added}" if key.zeros else "",
        added_on=f", {added} + ROWS{by}" if key.zeros else "",
        entry=where.entry("e"),
        later=where.later("e"),
        width=key.width,
        body=_body(key),
    )


def _body(key: Stored) -> str:
    """The logits of sixteen entries, with what scales and zeros make of the products."""
    groups = key.codec.groups(key.dim)
    if key.scales == "channel":
        return _products(key, f"store(s + g * STRIDE + t, {'x + set(bias[g])' if key.zeros else 'x'});")
    if key.scales == "token":
        logit = "mul_add(x, scale, set(total[g]) * zero)" if key.zeros else "x * scale"
        zero = ", zero = load(tile.key_numbers + TILE + t)" if key.zeros else ""
        return fill(TOKEN, zero=zero, products=_products(key, f"store(s + g * STRIDE + t, {logit});"))
    scaled = f"mul_add(x, scale, set(total[g * {groups} + n]) * zero)" if key.zeros else "x * scale"
    zero = f", zero = load(tile.key_numbers + ({groups} + n) * TILE + t)" if key.zeros else ""
    return fill(GROUPS, zero=zero, groups=groups, products=_products(key, f"logit[g] += {scaled};"))


def _products(key: Stored, keep: str) -> str:
    group = f"(piece * {key.width} + c * {key.lanes}) / {key.codec.group}"
    return fill(
        PRODUCTS,
        runs=key.runs,
        lanes=key.lanes,
        fields=2 * key.pieces,
        pieces=key.pieces,
        codes=key.fields("x[b]", f"f * {key.codec.bits}", fixed_point(key)),
        skip=f"if ({group} != n) continue;" if key.scales == "groups" else "",
        keep=keep,
    )
