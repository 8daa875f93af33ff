"""Logits of a tile of stored keys: q . k, with the scales folded into whatever is touched least.

Scales of a token multiply its logit, those of a channel multiply the query once per group of tokens, and those of
groups of channels decode each key in registers:  q . (code * scale + zero) = (q * scale) . code + q . zero.
"""

from __future__ import annotations

from kvcompile.kernels.cpp.address import Address
from kvcompile.kernels.cpp.text import fill

QUESTION = """
    static constexpr int KEY = $slots * 16;  // floats of a query, in the order of the stored codes
    struct Question {
      alignas(64) float q[G][KEY];
      $sum
    };
    KV_INLINE void arrange(const Query* states, Question& to, int g) {
      $total
      for (int c = 0; c < $runs; c++) {
        $pieces
      }
      $keep
    }
    """

DOTS = """
    // s[g][t] = q[g] . k[t]$plus for start <= t < stop, sixteen entries at a time (past the end the last one again):
    // first t, t + 4, t + 8 and t + 12, so that the transposing sum leaves them in order.
    template <int R>
    KV_INLINE void dots(const Row& row, const Tile& tile, const float* q, int start, int stop, float* s$bias_in) {
      if constexpr (R > ROWS) {
        dots<ROWS>(row, tile, q, start, stop, s$bias_first);
        dots<R - ROWS>(row, tile, q + ROWS * KEY, start, stop, s + ROWS * STRIDE$bias_rest);
      } else {
        for (int t = start; t < stop; t += 16) {
          F four[R][4];
          for (int j = 0; j < 4; j++) {
            F sum[R][4] = {};
            const $element* k[4];
            $numbers_of
            UNROLL for (int i = 0; i < 4; i++) {
              int e = least(t + j + 4 * i, stop - 1);
              k[i] = row.keys + $entry * $width;
              $numbers
              ahead(row.keys + $later * $width, sizeof($element) * $width);
            }
            UNROLL for (int c = 0; c < $runs; c++)
              UNROLL for (int i = 0; i < 4; i++) {
                $loads
                UNROLL for (int g = 0; g < R; g++) {
                  $products
                }
              }
            UNROLL for (int g = 0; g < R; g++) four[g][j] = quad(sum[g][0], sum[g][1], sum[g][2], sum[g][3]);
          }
          UNROLL for (int g = 0; g < R; g++)
            store(s + g * STRIDE + t, sum16(four[g][0], four[g][1], four[g][2], four[g][3])$bias_add);
        }
      }
    }
    """

PLAIN = """
    KV_INLINE void logits(const Row& row, const Tile& tile, const Question& q, float (&s)[G][STRIDE]) {
      dots<G>(row, tile, q.q[0], 0, tile.count, s[0]);
      $after
    }
    """

AFTER_TOKEN = """
    for (int g = 0; g < G; g++)
      for (int t = 0; t < tile.count; t += 16) {
        F x = load(s[g] + t) * load(tile.key_numbers + t);
        store(s[g] + t, $x);
      }
    """

CHANNEL = """
    // The same with the scales of $group consecutive entries folded into the query
    KV_INLINE void logits(const Row& row, const Tile& tile, const Question& q, float (&s)[G][STRIDE]) {
      for (int start = 0, stop; start < tile.count; start = stop) {
        stop = least(tile.count, start + $group - (tile.from + start) % $group);
        const fp16* scales = row.key_scales + $index * $step;
        alignas(64) float folded[G][KEY];
        $bias_out
        UNROLL for (int c = 0; c < $runs; c++) {
          $scales
          UNROLL for (int g = 0; g < G; g++) {
            $pieces
          }
        }
        $keep
        dots<G>(row, tile, folded[0], start, stop, s[0]$bias);
      }
    }
    """

BIAS = """
    float bias[G];  // q . zero
    F total[G][$pieces] = {};
    """

KEEP = """
    UNROLL for (int g = 0; g < G; g++) bias[g] = sum($total);
    """


def logits(where: Address) -> str:
    """`arrange` for the queries and `logits` for a tile."""
    key = where.key
    channel = key.scales == "channel"
    text = _question(where) + "\n" + _dots(where) + "\n"
    if channel:
        return text + _channel(where)
    after = ""
    if key.scales == "token":
        after = fill(
            AFTER_TOKEN, x="mul_add(set(q.sum[g]), load(tile.key_numbers + TILE + t), x)" if key.zeros else "x"
        )
    return text + fill(PLAIN, after=after)


def _count(lanes: int) -> str:
    return "" if lanes == 16 else f", {lanes}"


def _question(where: Address) -> str:
    key = where.key
    summed = key.scales == "token" and key.zeros
    lines = []
    for i in range(key.pieces):
        x = f"load(states + {key.channel(i, 'c')}{_count(key.lanes)}) * set(QUERY_SCALE)"
        lines += [f"F x{i} = {x};", f"store(to.q[g] + {key.slot(i, 'c')}, x{i});"]
        lines += [f"total += x{i};"] if summed else []
    return fill(
        QUESTION,
        slots=key.slots,
        runs=key.runs,
        sum="float sum[G];  // of its channels" if summed else "",
        total="F total = zero();" if summed else "",
        keep="to.sum[g] = sum(total);" if summed else "",
        pieces="\n".join(lines),
    )


def _dots(where: Address) -> str:
    key = where.key
    channel = key.scales == "channel" and key.zeros
    groups = key.scales == "groups"
    vectors = key.decoded("k[i]", "c", "n[i]") if groups else key.codes("k[i]", "c")
    loads = [f"F x{i} = held({x});" for i, x in enumerate(vectors)]
    products = [
        f"sum[g][i] = mul_add(x{i}, load(q + g * KEY + {key.slot(i, 'c')}), sum[g][i]);" for i in range(key.pieces)
    ]
    return fill(
        DOTS,
        plus=" + bias[g]" if channel else "",
        bias_in=", const float* bias" if channel else "",
        bias_first=", bias" if channel else "",
        bias_rest=", bias + ROWS" if channel else "",
        bias_add=" + set(bias[g])" if channel else "",
        element=key.element,
        numbers_of="const float* n[4];" if groups else "",
        numbers="n[i] = tile.key_numbers + e;" if groups else "",
        entry=where.entry("e"),
        later=where.later("e"),
        width=key.width,
        runs=key.runs,
        loads="\n".join(loads),
        products="\n".join(products),
    )


def _channel(where: Address) -> str:
    key = where.key
    scales, lines = [], []
    for i in range(key.pieces):
        channel, slot, count = key.channel(i, "c"), key.slot(i, "c"), _count(key.lanes)
        scales.append(f"F scale{i} = load(scales + {channel}{count});")
        scales += [f"F zero{i} = load(scales + D + {channel}{count});"] if key.zeros else []
        lines += [f"F x{i} = load(q.q[g] + {slot});", f"store(folded[g] + {slot}, x{i} * scale{i});"]
        lines += [f"total[g][{i}] = mul_add(x{i}, zero{i}, total[g][{i}]);"] if key.zeros else []
    total = " + ".join(f"total[g][{i}]" for i in range(key.pieces))
    return fill(
        CHANNEL,
        group=key.codec.group,
        index=where.group(key, "start"),
        step=f"{key.codec.parameters} * D",
        bias_out=fill(BIAS, pieces=key.pieces) if key.zeros else "",
        bias=", bias" if key.zeros else "",
        keep=fill(KEEP, total=total) if key.zeros else "",
        runs=key.runs,
        scales="\n".join(scales),
        pieces="\n".join(lines),
    )
