"""Logits of a tile of keys that are stored as floats: q . k, with scales folded into whatever is touched least.

Scales of a token multiply its logit, those of a channel multiply the query once per group of tokens, and those of
groups of channels decode each key in registers. Whole numbers have their own: `integer_keys`.
"""

from __future__ import annotations

from kvcompile.kernels.cpp.emit.address import Address
from kvcompile.kernels.cpp.emit.stored import Stored
from kvcompile.kernels.cpp.emit.text import fill

QUESTION = """
    static constexpr int KEY = $slots * 16;  // floats of a query, in whole vectors
    struct Question { alignas(64) float q[G][KEY]; };
    KV_INLINE void arrange(const Query* states, Question& to, int g) {
      $stores
    }
    """

DOTS = """
    // s[g][t] = q[g] . k[t] for start <= t < stop, sixteen entries at a time (past the end the last one again):
    // first t, t + 4, t + 8 and t + 12, so that the transposing sum leaves them in order.
    template <int R>
    KV_INLINE void dots(const Row& row, const Tile& tile, const float* q, int start, int stop, float* s) {
      if constexpr (R > ROWS) {
        dots<ROWS>(row, tile, q, start, stop, s);
        dots<R - ROWS>(row, tile, q + ROWS * KEY, start, stop, s + ROWS * STRIDE);
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
                $products
              }
            UNROLL for (int g = 0; g < R; g++) four[g][j] = quad(sum[g][0], sum[g][1], sum[g][2], sum[g][3]);
          }
          UNROLL for (int g = 0; g < R; g++)
            store(s + g * STRIDE + t, sum16(four[g][0], four[g][1], four[g][2], four[g][3]));
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
      for (int t = 0; t < tile.count; t += 16) store(s[g] + t, load(s[g] + t) * load(tile.key_numbers + t));
    """

CHANNEL = """
    // The same with the scales of $group consecutive entries folded into the query
    KV_INLINE void logits(const Row& row, const Tile& tile, const Question& q, float (&s)[G][STRIDE]) {
      for (int start = 0, stop; start < tile.count; start = stop) {
        stop = least(tile.count, start + $group - (tile.from + start) % $group);
        const fp16* scales = row.key_scales + $index * D;
        alignas(64) float folded[G][KEY];
        UNROLL for (int c = 0; c < $runs; c++) {
          $scales
        }
        dots<G>(row, tile, folded[0], start, stop, s[0]);
      }
    }
    """


def logits(where: Address) -> str:
    """`arrange` for the queries and `logits` for a tile."""
    key = where.key
    stores = [
        f"for (int c = 0; c < {key.runs}; c++)"
        f" store(to.q[g] + {key.slot(i, 'c')}, {key.part('states', i, 'c')} * set(QUERY_SCALE));"
        for i in range(key.pieces)
    ]
    question = fill(QUESTION, slots=key.slots, stores="\n".join(stores))
    return "\n".join((question, _dots(where), _channel(where) if key.scales == "channel" else _logits(key)))


def _logits(key: Stored) -> str:
    return fill(PLAIN, after=fill(AFTER_TOKEN) if key.scales == "token" else "")


def _dots(where: Address) -> str:
    key = where.key
    groups = key.scales == "groups"
    loads = key.decoded("k[i]", "c", "n[i]") if groups else key.codes("k[i]", "c")
    products = []
    for i, load in enumerate(loads):
        x = f"x{i or ''}"
        add = f"sum[g][i] = mul_add({x}, load(q + g * KEY + {key.slot(i, 'c')}), sum[g][i]);"
        products += [f"F {x} = held({load});", f"UNROLL for (int g = 0; g < R; g++) {add}"]
    return fill(
        DOTS,
        element=key.element,
        numbers_of="const float* n[4];" if groups else "",
        numbers="n[i] = tile.key_numbers + e;" if groups else "",
        entry=where.entry("e"),
        later=where.later("e"),
        width=key.width,
        runs=key.runs,
        products="\n".join(products),
    )


def _channel(where: Address) -> str:
    key = where.key
    scales = []
    for i in range(key.pieces):
        scale, slot = f"scale{i or ''}", key.slot(i, "c")
        store = f"store(folded[g] + {slot}, load(q.q[g] + {slot}) * {scale});"
        scales += [f"F {scale} = {key.part('scales', i, 'c')};", f"UNROLL for (int g = 0; g < G; g++) {store}"]
    return fill(
        CHANNEL,
        group=key.codec.group,
        index=where.group(key, "start"),
        runs=key.runs,
        scales="\n".join(scales),
    )
