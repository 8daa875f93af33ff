"""Logits of a tile of integer codes: q . k in whole numbers, with q rounded to 16 bits; scales as in `step_keys`.

q . (code * scale + zero) = step * scale * (round(q / step) . code) + zero * sum(q), where step = max|q| / 32767: each
channel is off by 2^-16 of the largest at most, some hundred times less than 8-bit codes are.
"""

from __future__ import annotations

from kvcompile.kernels.cpp.emit.address import Address
from kvcompile.kernels.cpp.emit.stored import Stored
from kvcompile.kernels.cpp.emit.text import fill

QUESTION = """
    static constexpr int KEY = $slots * 16;  // numbers of a query, in the order of the stored codes
    struct Question {
      alignas(64) int16_t q[G][KEY];
      float step[G], sum[G][$groups];  // sums of channels, by group
    };
    KV_INLINE void arrange(const Query* states, Question& to, int g) {
      F x[$slots], total[$groups] = {};
      UNROLL for (int c = 0; c < $runs; c++) {
        $loads
      }
      to.step[g] = to_whole<$limit>(x, to.q[g]);
      float steps = to.step[g] > 0 ? 1 / to.step[g] : 0;
      UNROLL for (int c = 0; c < $runs; c++) {
        $totals
      }
      for (int i = 0; i < $groups; i++) to.sum[g][i] = sum(total[i]) * to.step[g];
    }
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
    KV_INLINE void dots(const Row& row, const Tile& tile, const int16_t* q, const float* step, const float* $added,
                        int start, int stop, float* s) {
      if constexpr (R > ROWS) {
        dots<ROWS>(row, tile, q, step, $added, start, stop, s);
        dots<R - ROWS>(row, tile, q + ROWS * KEY, step + ROWS, $added + ROWS$by, start, stop, s + ROWS * STRIDE);
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
          UNROLL for (int b = 0; b < BLOCKS; b++) codes[b] = held(field(x[b], f * $bits, $bits));
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
    F scale = load(tile.key_numbers + t), zero = load(tile.key_numbers + TILE + t);
    $products
    """

GROUPS = """
    F logit[R] = {};
    UNROLL for (int n = 0; n < $groups; n++) {
      F scale = load(tile.key_numbers + n * TILE + t), zero = load(tile.key_numbers + ($groups + n) * TILE + t);
      $products
    }
    UNROLL for (int g = 0; g < R; g++) store(s + g * STRIDE + t, logit[g]);
    """

LOGITS = """
    KV_INLINE void logits(const Row& row, const Tile& tile, const Question& q, float (&s)[G][STRIDE]) {
      dots<G>(row, tile, q.q[0], q.step, q.sum[0], 0, tile.count, s[0]);
    }
    """

CHANNEL = """
    static constexpr int KEY = $key;  // numbers of a query, in the order of the stored codes
    struct Question {
      alignas(64) int16_t q[G][KEY];
      alignas(64) float channels[G][KEY];
      float step[G];
    };
    KV_INLINE void arrange(const Query* states, Question& to, int g) {
      F x[$slots];
      UNROLL for (int c = 0; c < $runs; c++) {
        $loads
      }
      to.step[g] = to_whole<$limit>(x, to.q[g]);
      for (int i = 0; i < $slots; i++) store(to.channels[g] + i * 16, x[i]);
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
        float unit = to_whole<32767>(x, scales), step[G], bias[G];  // bias: q . zero
        UNROLL for (int c = 0; c < $runs; c++) {
          $zeros
        }
        for (int g = 0; g < G; g++) {
          for (int i = 0; i < KEY; i += 32) scaled(q.q[g] + i, scales + i, folded[g] + i);
          F total = zero();
          UNROLL for (int i = 0; i < $slots; i++) total = mul_add(load(q.channels[g] + i * 16), x[i], total);
          step[g] = q.step[g] * unit * 32768;
          bias[g] = sum(total);
        }
        dots<G>(row, tile, folded[0], step, bias, start, stop, s[0]);
      }
    }
    """


def logits(where: Address) -> str:
    """`arrange` for the queries and `logits` for a tile."""
    if where.key.scales == "channel":
        return _channel(where)
    return "\n".join((_question(where.key), _dots(where), fill(LOGITS)))


def _limit(key: Stored) -> int:
    """The most that a query's number may be: 16 bits hold it, and 32 bits the products of a lane, four of each run."""
    most_code = (1 << key.codec.bits) - 1
    return min(2**15 - 1, 2**29 // (key.slots * most_code))


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
        zeros=_vectors(key, "from + D"),
        limit=_limit(key),
    )


def _vectors(key: Stored, array: str, times: str = "") -> str:
    """`x[slot]`: the channels of an array, run `c`."""
    return "\n".join(f"{_slot(key, i)} = {key.part(array, i, 'c')}{times};" for i in range(key.pieces))


def _slot(key: Stored, piece: int) -> str:
    return f"x[{piece * key.runs} + c]" if piece else "x[c]"


def _question(key: Stored) -> str:
    totals = [
        f"total[{key.group(i, 'c')}] += to_float(whole({_slot(key, i)} * set(steps)));" for i in range(key.pieces)
    ]
    return fill(
        QUESTION,
        slots=key.slots,
        groups=key.codec.groups(key.dim),
        limit=_limit(key),
        runs=key.runs,
        loads=_vectors(key, "states", " * set(QUERY_SCALE)"),
        totals="\n".join(totals),
    )


def _dots(where: Address) -> str:
    key = where.key
    groups = key.codec.groups(key.dim)
    if key.scales == "channel":
        body = _products(key, "store(s + g * STRIDE + t, x + set(bias[g]));")
    elif key.scales == "token":
        body = fill(
            TOKEN, products=_products(key, "store(s + g * STRIDE + t, mul_add(x, scale, set(total[g]) * zero));")
        )
    else:
        scaled = f"logit[g] += mul_add(x, scale, set(total[g * {groups} + n]) * zero);"
        body = fill(GROUPS, groups=groups, products=_products(key, scaled))
    return fill(
        DOTS,
        added="bias" if key.scales == "channel" else "total",
        by=f" * {groups}" if key.scales == "groups" else "",
        entry=where.entry("e"),
        later=where.later("e"),
        width=key.width,
        body=body,
    )


def _products(key: Stored, keep: str) -> str:
    group = f"(piece * {key.width} + c * {key.lanes}) / {key.codec.group}"
    return fill(
        PRODUCTS,
        runs=key.runs,
        lanes=key.lanes,
        fields=2 * key.pieces,
        pieces=key.pieces,
        bits=key.codec.bits,
        skip=f"if ({group} != n) continue;" if key.scales == "groups" else "",
        keep=keep,
    )
