"""A decoded token and the tiers of its rows in C++: one call a layer, to the bit what `kernels.demote` gives."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels import demote as reference
from kvcompile.kernels.codecs import Encoder
from kvcompile.kernels.codecs import encode as encode_by_torch
from kvcompile.kernels.cpp import build, encode, simd
from kvcompile.kernels.cpp.emit.stored import ELEMENTS
from kvcompile.kernels.cpp.emit.text import fill
from kvcompile.kernels.demote import Demoted, DemoteSpec, NewTokens, Rule, TierRows, spec_of
from kvcompile.kernels.pointers import address, opaque
from kvcompile.plan.formats import Integer

SMALL = 1 << 15  # entries below which one thread is faster than two
SIDES = ("high_keys", "high_values", "low_keys", "low_values")

SOURCE = """
    // Demotion: a decoded token enters the high tier of each row ($high), and what it pushes
    // out is dropped or goes into the low one ($low).
    typedef $input In;

    $encoders

    struct Tier {
      uint8_t* keys;
      fp16* key_scales;
      uint8_t* values;
      fp16* value_scales;
      int32_t* positions;
      const int64_t* begins;     // row r lies from begins[r] on
      float *received, *since;   // [R, places]: attention that the entries have received, and from which query on
      int64_t places;
    };
    struct Call {
      Tier low, high;
      const In *keys, *values;  // of the new tokens
      const int32_t* positions;
      const float* sums;  // [R, columns]: what each entry has received now: low ones, high ones, the new token
      const float *tokens, *below, *prune;  // [R]
      int64_t* outcomes;  // [R]
      float* scales;      // the largest of the new keys and values
      int64_t columns, group, recent, sinks, rows, threads;
      // behind it: the entries of each row in the low tier, in the high one, and which new token is its (-1: none)
    };
    enum Outcome { NOTHING, GROWS, DROPS, REPLACES, LOWERS };

    // The weakest entry of a tier of a row; where it is infinite there is none.
    struct Weakest {
      float mean;
      int64_t place;
    };
    KV_INLINE F some(const float* p, int64_t n) { return n < 16 ? load(p, (int)n) : load(p); }

    // Count what n entries have received more; the least mean is of those that came before query `until`.
    static Weakest count(float* received, const float* since, const float* sums, int64_t n, float group, float tokens,
                         float until) {
      F least = set(INFINITY);
      for (int64_t j = 0; j < n; j += 16) {
        const int64_t here = n - j;
        F all = some(received + j, here) + some(sums + j, here) / set(group), first = some(since + j, here);
        if (here < 16) store(received + j, all, (int)here);
        else store(received + j, all);
        F mean = if_less(first, set(until), all / (set(tokens) - first), set(INFINITY));
        least = min(least, here < 16 ? keep(mean, (int)here, INFINITY) : mean);
      }
      const float mean = smallest(least);
      if (mean < INFINITY)
        for (int64_t j = 0; j < n; j++)
          if (since[j] < until && received[j] / (tokens - since[j]) == mean) return {mean, j};
      return {INFINITY, 0};
    }

    // The numbers that codes stand for; scale and zero are rounded to In, and so are product and sum.
    template <int D, int BITS> static void decode(const uint8_t* codes, const fp16* scales, In* x) {
      constexpr int WIDTH = D * BITS / 8;
      float code[D], numbers[16];
      for (int i = 0; i < 8 / BITS; i++)
        for (int c = 0; c < WIDTH; c++) code[i * WIDTH + c] = (float)(codes[c] >> (i * BITS) & ((1 << BITS) - 1));
      In rounded[2];
      store(rounded, load(scales, 2), 2);
      store(numbers, load((const In*)rounded, 2));
      for (int c = 0; c < D; c += 16) {
        const int n = D - c < 16 ? D - c : 16;
        store(x + c, load((const float*)code + c, n) * set(numbers[0]), n);
        store(x + c, held(load((const In*)x + c, n)) + set(numbers[1]), n);  // held: not one step with the product
      }
    }

    // Put the high entry at `from` into the low tier at `to`.
    static void lower(const Tier& high, int64_t from, const Tier& low, int64_t to) {
      In keys[high_keys::D], values[high_values::D];
      const uint8_t* key_codes = high.keys + from * high_keys::WIDTH;
      const uint8_t* value_codes = high.values + from * high_values::WIDTH;
      decode<high_keys::D, $key_bits>(key_codes, high.key_scales + 2 * from, keys);
      decode<high_values::D, $value_bits>(value_codes, high.value_scales + 2 * from, values);
      low_keys::encode(keys, low.keys + to * low_keys::WIDTH, low.key_scales + 2 * to, 1);
      low_values::encode(values, low.values + to * low_values::WIDTH, low.value_scales + 2 * to, 1);
      low.positions[to] = high.positions[from];
    }

    KV_INLINE float size(const fp16* scale) {
      float x[16];
      store(x, load(scale, 1));
      return x[0] < INFINITY ? x[0] : INFINITY;
    }

    extern "C" void demote(const Call* call) {
      const Call& c = *call;
      const int64_t *lows = (const int64_t*)(call + 1), *highs = lows + c.rows, *comes = highs + c.rows;
      float keys = -1, values = -1;
    #pragma omp parallel for num_threads((int)c.threads) reduction(max : keys, values)
      for (int64_t r = 0; r < c.rows; r++) {
        float *low = c.low.received + r * c.low.places, *high = c.high.received + r * c.high.places;
        float *low_since = c.low.since + r * c.low.places, *high_since = c.high.since + r * c.high.places;
        const float *sums = c.sums + r * c.columns, tokens = c.tokens[r], group = (float)c.group;
        const float until = c.recent ? tokens - (float)c.recent : INFINITY;
        const Weakest v = count(low, low_since, sums, lows[r], group, tokens, INFINITY);
        const Weakest u = count(high, high_since, sums + lows[r], highs[r], group, tokens, until);
        c.outcomes[r] = NOTHING;
        if (comes[r] < 0) continue;

        const bool weak = u.mean < c.below[r];
        const Outcome outcome = u.mean < c.prune[r] && u.mean < v.mean ? DROPS
                                : weak && v.mean < c.prune[r]          ? REPLACES
                                : weak                                 ? LOWERS
                                                                       : GROWS;
        c.outcomes[r] = outcome;
        const int64_t place = outcome == GROWS ? highs[r] : u.place, to = c.high.begins[r] + place;
        if (outcome == REPLACES || outcome == LOWERS) {
          const int64_t below = outcome == REPLACES ? v.place : lows[r];
          lower(c.high, to, c.low, c.low.begins[r] + below);
          low[below] = high[place], low_since[below] = high_since[place];
        }
        const int64_t i = comes[r];
        fp16 *key_scales = c.high.key_scales + 2 * to, *value_scales = c.high.value_scales + 2 * to;
        high_keys::encode(c.keys + i * high_keys::D, c.high.keys + to * high_keys::WIDTH, key_scales, 1);
        high_values::encode(c.values + i * high_values::D, c.high.values + to * high_values::WIDTH, value_scales, 1);
        c.high.positions[to] = c.positions[i];
        high[place] = tokens <= (float)c.sinks ? INFINITY : sums[lows[r] + highs[r]] / group;
        high_since[place] = (float)c.positions[i];
        const float key = size(key_scales), value = size(value_scales);
        keys = key > keys ? key : keys, values = value > values ? value : values;
      }
      c.scales[0] = keys, c.scales[1] = values;
    }
    """

ENCODER = """
    namespace $side {
    $body
    }  // namespace $side

    """


def supports(spec: DemoteSpec) -> bool:
    """Whether there is C++ for a spec: whole numbers with one scale and one zero a token."""
    plain = all(isinstance(c.format, Integer) and c.axis == "token" and not c.group for c in (*spec.high, *spec.low))
    return plain and spec.dtype in encode.TYPES.values()


def source(spec: DemoteSpec) -> str:
    """The C++ text of a spec, without the vectors that all share."""
    dims = (spec.head_dim, spec.value_dim) * 2
    sides = zip(SIDES, (*spec.high, *spec.low), dims, strict=True)
    texts = [fill(ENCODER, side=side, body=encode.body(codec, dim, spec.dtype)) for side, codec, dim in sides]
    return fill(
        SOURCE,
        high=f"keys {spec.high[0].name}, values {spec.high[1].name}",
        low=f"{spec.low[0].name}, {spec.low[1].name}",
        input=ELEMENTS[spec.dtype],
        encoders="\n".join(texts),
        key_bits=spec.high[0].bits,
        value_bits=spec.high[1].bits,
    )


@opaque
def demote(
    low: TierRows, high: TierRows, new: NewTokens, sums: Tensor, rule: Rule, encoder: Encoder = encode_by_torch
) -> Demoted:
    """Same contract as `kernels.demote.demote`, for tiers on the CPU."""
    spec = spec_of(low, high, new)
    kernel = _kernel(spec)
    if kernel is None:
        return reference.demote(low, high, new, sums, rule, encoder)
    count, rows = len(new.rows), len(low.codes.lengths)
    numbers = [*_tier(low, kernel.low), *_tier(high, kernel.high)]
    keys, values, positions = (x.contiguous() for x in (new.keys, new.values, new.positions))
    numbers.append(address("new keys", keys, new.keys.dtype, (count, spec.head_dim)))
    numbers.append(address("new values", values, new.keys.dtype, (count, spec.value_dim)))
    numbers.append(address("new positions", positions, torch.int32, (count,)))
    came = [-1] * rows
    for i, r in enumerate(new.rows):
        came[r] = i
    lengths = zip(low.codes.lengths, high.codes.lengths, came, strict=True)
    longest = max(a + b + (i >= 0) for a, b, i in lengths)
    numbers.append(address("sums", sums, torch.float32, (rows, longest), (1,)))
    numbers += [address(name, getattr(rule, name), torch.float32, (rows,)) for name in ("tokens", "below", "prune")]
    outcomes = torch.empty(rows, dtype=torch.int64, device="cpu")
    scales = torch.empty(2, dtype=torch.float32, device="cpu")
    threads = torch.get_num_threads() if rows * longest > SMALL else 1
    numbers += [outcomes.data_ptr(), scales.data_ptr()]
    numbers += [sums.stride(0), rule.group, rule.recent, rule.sinks, rows, threads]
    numbers += [*low.codes.lengths, *high.codes.lengths, *came]
    kernel.run(Struct(f"{len(numbers)}q").pack(*numbers))
    return Demoted(outcomes.tolist(), tuple(scales.tolist()) if count else ())


def _tier(tier: TierRows, widths: tuple[int, int]) -> list[int]:
    """The numbers of `Tier`."""
    c, numbers = tier.codes, []
    entries, rows, places = c.positions.shape[0], len(c.lengths), tier.received.shape[1]
    for codes, scales, width in zip((c.keys, c.values), (c.key_scales, c.value_scales), widths, strict=True):
        if scales is None:
            raise RuntimeError("a tier of whole numbers has scales")
        numbers.append(address("codes", codes, torch.uint8, (entries, width)))
        numbers.append(address("scales", scales, torch.float16, (entries, 2, 1)))
    numbers.append(address("positions", c.positions, torch.int32, (entries,)))
    numbers.append(address("begins", c.begins, torch.int64, (rows,)))
    numbers.append(address("received", tier.received, torch.float32, (rows, places)))
    return [*numbers, address("since", tier.since, torch.float32, (rows, places)), places]


@dataclass(frozen=True)
class Kernel:
    """The compiled function, and the bytes of a key and of a value in either tier."""

    run: Callable[..., Any]
    low: tuple[int, int]
    high: tuple[int, int]


@lru_cache(maxsize=256)
def _kernel(spec: DemoteSpec) -> Kernel | None:
    """None where there is no C++ for a spec."""
    if not supports(spec):
        return None
    function: Any = build.load(simd.prelude() + source(spec), "demote").demote
    function.argtypes, function.restype = (ctypes.c_char_p,), None
    low, high = ((key.width(spec.head_dim), value.width(spec.value_dim)) for key, value in (spec.low, spec.high))
    return Kernel(function, low, high)
