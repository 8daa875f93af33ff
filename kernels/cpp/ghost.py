"""Ghost scores in C++: a chunk of a head at a time, 64 queries together; no more than their logits is ever held."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.cpp import build, simd
from kvcompile.kernels.cpp.emit.parts import base2
from kvcompile.kernels.cpp.emit.prefill_kernel import multiply
from kvcompile.kernels.cpp.emit.stored import ELEMENTS, decimal
from kvcompile.kernels.cpp.emit.text import fill
from kvcompile.kernels.pointers import address, opaque
from kvcompile.kernels.reference import ghost as reference
from kvcompile.kernels.reference.ghost import GhostSpec, Reread, spec_of
from kvcompile.plan.ghost import GhostRule

TYPES = ("float32", "float16", "bfloat16")

HEAD = """
    // $name
    // How much the outputs of a text's own queries, turned on (ghosts q'), would change without each of its entries:
    //   s_j = sum_t (p_tj / max(1 - p_tj, 1e-6))^2 |v_j - o_t|^2   over $near and the query heads of the group,
    //   p_tj = exp(g_tj) / Z_t,   o_t = sum_j p_tj v_j + sum_j exp(l_tj) / Z_t v_j,
    //   g_tj = $look   over sinks and chunk,
    //   l_tj = $again   over $own <= j <= t of the chunk,
    //   Z_t = $total.
    // Columns are sinks, then the chunk; exp(x) is 2^(x log2(e)).
    #include <vector>

    typedef $element Element;       // of queries, keys and values
    constexpr int G = $group;        // query heads that share a KV head
    constexpr int D = $dim, DV = $value_dim;   // channels of keys, of values
    constexpr int64_t CHUNK = $chunk, OWN_FROM = $own;
    constexpr float LOGIT = $logit;  // what a logit is times log2(e), for one of q . k
    constexpr int TILE = 64;         // rows of weights that are multiplied with values at a time
    constexpr int LANES = 64;        // queries that go together, numbered token by token
    constexpr float MASKED = -1e30f; // a logit that weighs nothing
    #if defined(KV_AVX512)
    constexpr int DOWN = 4, ACROSS = 4;  // vectors of sums that stay in registers
    #else
    constexpr int DOWN = 2, ACROSS = 2;
    #endif
    #define UNROLL _Pragma("GCC unroll 16")
    KV_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
    KV_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
    struct Rows {  // [heads, n, channels]
      const Element* at;
      int64_t head, token;
    };
    KV_INLINE const Element* row(const Rows& x, int64_t head, int64_t token) {
      return x.at + head * x.head + token * x.token;
    }
    struct Queries {  // [heads, G, n, D]
      const Element* at;
      int64_t head, query, token;
    };
    struct Call {
      Queries queries, ghosts;
      Rows keys, values, sink_keys, sink_values;
      float* scores;           // [heads, tokens]
      int64_t heads, tokens, start, sinks, threads;  // start: true position of the first token
      $learned_field
    };
    """

FLOATS = """
    // Numbers as they are multiplied: one at a time, in float32.
    constexpr int PAIR = 1;
    typedef float Number;
    typedef F Vector;
    KV_INLINE void put(Number* to, const float* x, int64_t) { *to = *x; }
    KV_INLINE void put(Number* x, const F (&weight)[1]) { store(x, weight[0]); }
    KV_INLINE F rounded(F x) { return x; }
    """

PAIRS = """
    // Numbers as they are multiplied: two at a time where the processor multiplies bfloat16 and adds in float32.
    #if defined(KV_AVX512) && defined(__AVX512BF16__)
    constexpr int PAIR = 2;
    struct Number { Element half[2]; };
    typedef U Vector;
    KV_INLINE Vector load(const Number* p) { return read<Vector>(p); }
    KV_INLINE Vector set(Number x) { return unsigned_all(bits_as<uint32_t>(x)); }
    KV_INLINE F mul_add(Vector a, Vector b, F c) { return (F)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
    KV_INLINE U rounded_bits(F x) { return (bits_as<U>(x) + unsigned_all(0x8000u)) & unsigned_all(0xffff0000u); }
    KV_INLINE F rounded(F x) { return bits_as<F>(rounded_bits(x)); }
    KV_INLINE void put(Number* to, const float* x, int64_t next) {  // x[0] and x[next], which were bfloat16
      const uint32_t pair = bits_as<uint32_t>(x[0]) >> 16 | (bits_as<uint32_t>(x[next]) & 0xffff0000u);
      memcpy(to, &pair, sizeof pair);
    }
    KV_INLINE void put(Number* x, const F (&weight)[2]) {
      U pair = rounded_bits(weight[0]) >> 16 | rounded_bits(weight[1]);
      memcpy(x, &pair, sizeof pair);
    }
    #else
    $floats
    #endif
    """

BLOCK = """
    constexpr int DEPTH = (D + PAIR - 1) / PAIR;  // numbers of a key
    struct alignas(64) Line { float x[LANES]; };  // of each query
    struct alignas(64) Numbers { Number x[LANES]; };

    // A chunk of a head, and LANES of its queries: entries and channels lie down, queries across.
    struct Chunk {
      int64_t head, begin, n;  // its tokens are begin : begin + n of the call
      int64_t outside, own, columns, pairs;  // sinks before it; the first column that is seen again
      std::vector<Number> keys, values;  // [columns, DEPTH], [pairs, DV]
      std::vector<float> exact;          // the values, [columns, DV]
      std::vector<Line> look, again;     // [columns]: logits, then weights
      std::vector<Numbers> weights;      // [pairs]: their sums
      Numbers q[DEPTH];
      alignas(64) float out[DV * LANES], share[LANES], token[LANES];
    };

    // N channels as floats
    template <int N> KV_INLINE void fetch(const Element* from, float* to) {
      int i = 0;
      for (; i + 16 <= N; i += 16) store(to + i, load(from + i));
      if (i < N) store(to + i, load(from + i, N - i), N - i);
    }

    static void open(const Call& a, Chunk& c, int64_t head, int64_t number) {
      const int64_t size = CHUNK ? CHUNK : a.tokens, skipped = CHUNK ? a.start % CHUNK : 0;
      c.head = head, c.begin = most(0, number * size - skipped);
      c.n = least(a.tokens, (number + 1) * size - skipped) - c.begin;
      c.outside = least(a.sinks, a.start + c.begin), c.columns = c.outside + c.n;
      c.own = c.outside + least(c.n, most(0, OWN_FROM - a.start - c.begin));
      c.pairs = (c.columns + PAIR - 1) / PAIR;
      c.keys.resize(c.columns * DEPTH), c.values.resize(c.pairs * DV);
      c.exact.assign(c.pairs * PAIR * DV, 0.0f);
      c.look.resize(c.columns), c.again.resize(c.columns), c.weights.resize(c.pairs);
      for (int64_t j = 0; j < c.columns; j++) {
        const bool sink = j < c.outside;
        const int64_t t = sink ? j : c.begin + j - c.outside;
        alignas(64) float key[DEPTH * PAIR] = {};
        fetch<D>(row(sink ? a.sink_keys : a.keys, head, t), key);
        for (int d = 0; d < DEPTH; d++) put(&c.keys[j * DEPTH + d], key + d * PAIR, 1);
        fetch<DV>(row(sink ? a.sink_values : a.values, head, t), c.exact.data() + j * DV);
      }
      for (int64_t j = 0; j < c.pairs; j++)
        for (int d = 0; d < DV; d++) put(&c.values[j * DV + d], c.exact.data() + j * PAIR * DV + d, DV);
      memset(a.scores + head * a.tokens + c.begin, 0, c.n * sizeof(float));
    }

    // Queries `from` and after, as columns; zeros behind the last
    static void arrange(const Queries& queries, Chunk& c, int64_t from, int across) {
      if (from + across * 16 > c.n * G) memset(c.q, 0, sizeof c.q);
      for (int64_t i = 0; i < least(across * 16, c.n * G - from); i++) {
        const int64_t t = (from + i) / G, g = (from + i) % G;
        const Element* q = queries.at + c.head * queries.head + g * queries.query + (c.begin + t) * queries.token;
        alignas(64) float x[DEPTH * PAIR] = {};
        fetch<D>(q, x);
        for (int d = 0; d < DEPTH; d++) put(&c.q[d].x[i], x + d * PAIR, 1);
      }
    }

    // Logits of columns [from, to), before the scale: [column][query]
    static void multiply_keys(Chunk& c, std::vector<Line>& logits, int64_t from, int64_t to, int across) {
      multiply<false>(&c.keys[from * DEPTH], DEPTH, 1, c.q[0].x, logits[from].x, (int)(to - from), DEPTH, across);
      $cap
    }
    """

SCORE = """
    // Logits become weights, relative to the largest, of 16 queries from `v` on; columns before `seen` are seen again.
    static void softmax(const Call& a, Chunk& c, int64_t from, int64_t seen, int v) {
      const F token = load(c.token + v);
      $top
      for (int64_t j = 0; j < c.columns; j++) top = max(top, load(c.look[j].x + v));
      for (int64_t j = c.own; j < seen; j++) {
        float* x = c.again[j].x + v;
        const int64_t t = j - c.outside;
        if (t > (from + v) / G) store(x, if_less(token, set((float)t), set(MASKED), load(x)));
        top = max(top, load(x));
      }
      const F least = top * set(-LOGIT);
      $total
      for (int64_t j = 0; j < c.columns; j += PAIR) {
        F sum[PAIR] = {};
        for (int64_t i = 0; i < PAIR && j + i < c.columns; i++) {
          float *look = c.look[j + i].x + v, *again = c.again[j + i].x + v;
          F p = exp2_negative(mul_add(load(look), set(LOGIT), least));
          F r = j + i >= c.own && j + i < seen ? exp2_negative(mul_add(load(again), set(LOGIT), least)) : zero();
          store(look, p), store(again, r);
          sum[i] = p + r, total += rounded(sum[i]);
        }
        put(c.weights[j / PAIR].x + v, sum);
      }
      store(c.share + v, if_less(token, set((float)c.n), set(1.0f) / total, zero()));
    }

    // What the entries of a chunk near 16 queries are worth to them: N entries from j on
    template <int N> KV_INLINE void change(const Chunk& c, int64_t j, int v, float* scores) {
      const float* values = c.exact.data() + (c.outside + j) * DV;
      const F share = load(c.share + v);
      F far[N] = {};
      for (int d = 0; d < DV; d++) {  // not v^2 - 2 v o + o^2, of which little is left where o is near v
        F o = load(c.out + d * LANES + v) * share;
        UNROLL for (int i = 0; i < N; i++) {
          F x = o - set(values[i * DV + d]);
          far[i] = mul_add(x, x, far[i]);
        }
      }
      UNROLL for (int i = 0; i < N; i++) {
        const int64_t column = c.outside + j + i;
        F p = load(c.look[column].x + v);
        if constexpr (PAIR > 1) {  // what was rounded is the sum: 1 - p is then what the others weigh
          F sum = p + load(c.again[column].x + v);
          p = p * rounded(sum) / max(sum, set(1e-30f));
        }
        p = p * share;
        F odds = p / max(set(1.0f) - p, set(1e-6f));
        F x = odds * odds * far[i];
        $band_mask
        scores[j + i] += sum(x);
      }
    }

    static void score(const Call& a, Chunk& c, int64_t from) {
      const int64_t queries = least(LANES, c.n * G - from);
      const int across = (int)((queries + 15) / 16);
      const int64_t seen = c.outside + (from + queries - 1) / G + 1;  // columns that any of them sees again end here
      for (int i = 0; i < across * 16; i++) c.token[i] = (float)((from + i) / G);
      arrange(a.ghosts, c, from, across);
      multiply_keys(c, c.look, 0, c.columns, across);
      arrange(a.queries, c, from, across);
      if (c.own < seen) multiply_keys(c, c.again, c.own, seen, across);
      for (int v = 0; v < across * 16; v += 16) softmax(a, c, from, seen, v);
      memset(c.out, 0, sizeof c.out);
      for (int64_t j = 0; j < c.pairs; j += TILE)
        multiply<true>(&c.values[j * DV], 1, DV, c.weights[j].x, c.out, DV, (int)least(TILE, c.pairs - j), across);
      float* scores = a.scores + c.head * a.tokens + c.begin;
      for (int v = 0; v < across * 16; v += 16) {
        $range
        for (; j + 4 <= end; j += 4) change<4>(c, j, v, scores);
        for (; j < end; j++) change<1>(c, j, v, scores);
      }
    }

    extern "C" void ghost(const Call* call) {
      const Call& a = *call;
      const int64_t chunks = CHUNK ? (a.start % CHUNK + a.tokens + CHUNK - 1) / CHUNK : 1, tasks = a.heads * chunks;
      // a chunk of a head is scored by one thread: sums come out the same every time
    #pragma omp parallel num_threads((int)least(tasks, a.threads))
      {
        Chunk* chunk = new Chunk;
    #pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++) {
          open(a, *chunk, i / chunks, i % chunks);
          for (int64_t from = 0; from < chunk->n * G; from += LANES) score(a, *chunk, from);
        }
        delete chunk;
      }
    }
    """

CAP = """
    for (int64_t j = from; j < to; j++)
      for (int v = 0; v < across * 16; v += 16) {
        float* x = logits[j].x + v;
        store(x, tanh(load(x) * set($inside)) * set($cap));
      }
    """

LEARNED = """
    alignas(64) float sink[16];
    for (int i = 0; i < 16; i++) sink[i] = a.learned[c.head * G + (from + v + i) % G] * $unscaled;
    F top = load(sink);
    """

RANGE = """
    const int64_t first = (from + v) / G, last = (from + v + 15) / G;
    int64_t j = most(0, first - $band);
    const int64_t end = least(c.n, last + $band + 1);
    """

MASK = """
    F apart = load(c.token + v) - set((float)(j + i));
    x = if_less(set($band.5f), max(apart, zero() - apart), zero(), x);
    """


def supports(spec: GhostSpec) -> bool:
    """Whether there is C++ for a spec."""
    return spec.dtype in TYPES


def source(spec: GhostSpec) -> str:
    """The C++ text of a spec, without the vectors that all share."""
    rule = spec.rule
    plain, cap = f"{{}} . k_j * {rule.scale:.9g}", rule.softcap
    logit = f"{cap:g} tanh({plain} / {cap:g})" if cap else plain
    total = "sum_j exp(g_tj) + sum_j exp(l_tj)"
    head = fill(
        HEAD,
        name=spec.name,
        near=f"|t - j| <= {rule.band}" if rule.band else "all t",
        look=logit.format("q'_t"),
        again=logit.format("q_t"),
        own=rule.own_from,
        total=f"{total} + exp(sink)" if spec.sink else total,
        element=ELEMENTS[spec.dtype],
        group=spec.group,
        dim=spec.head_dim,
        value_dim=spec.value_dim,
        chunk=rule.chunk,
        logit=base2(1 if cap else rule.scale),
        learned_field="const float* learned;  // [heads * G]: logits of no entry" if spec.sink else "",
    )
    numbers = fill(PAIRS, floats=fill(FLOATS)) if spec.dtype == "bfloat16" else fill(FLOATS)
    block = fill(BLOCK, cap=fill(CAP, inside=decimal(rule.scale / cap), cap=decimal(cap)) if cap else "")
    learned = fill(LEARNED, unscaled=decimal(1 if cap else 1 / rule.scale))
    score = fill(
        SCORE,
        top=learned if spec.sink else "F top = set(MASKED);",
        total="F total = exp2_negative(mul_add(load(sink), set(LOGIT), least));" if spec.sink else "F total = zero();",
        band_mask=fill(MASK, band=rule.band) if rule.band else "",
        range=fill(RANGE, band=rule.band) if rule.band else "int64_t j = 0;\nconst int64_t end = c.n;",
    )
    return "\n".join((head, numbers, multiply("Number", "Vector"), block, score))


NAMES = "queries", "ghosts", "keys", "values", "keys of sinks", "values of sinks"


@opaque
def ghost_scores(text: Reread, rule: GhostRule) -> Tensor:
    """Same contract as `kernels.reference.ghost.ghost_scores`, for tensors on the CPU, in float32."""
    spec = spec_of(text, rule)
    kernel = _kernel(spec)
    if kernel is None:
        return reference.ghost_scores(text, rule)
    queries, sinks, learned = text.queries, text.sinks, text.learned
    heads, group, tokens, dim = queries.shape
    numbers: list[int] = []
    rows = (heads, tokens, dim), (heads, tokens, spec.value_dim)
    firsts = (heads, sinks[0].shape[1], dim), (heads, sinks[0].shape[1], spec.value_dim)
    shapes = queries.shape, queries.shape, *rows, *firsts
    for name, x, shape in zip(NAMES, text.tensors, shapes, strict=True):
        numbers += [address(name, x, queries.dtype, tuple(shape), (1,)), *x.stride()[:-1]]
    scores = torch.empty(heads, tokens, dtype=torch.float32, device=queries.device)
    numbers += [scores.data_ptr(), heads, tokens, text.start, sinks[0].shape[1], torch.get_num_threads()]
    if learned is not None:
        logits = learned.float().contiguous()
        numbers.append(address("learned sinks", logits, torch.float32, (heads, group)))
    if tokens:
        kernel(Struct(f"{len(numbers)}q").pack(*numbers))
    return scores


@lru_cache(maxsize=256)
def _kernel(spec: GhostSpec) -> Callable[..., Any] | None:
    """None where there is no C++ for a spec."""
    if not supports(spec):
        return None
    function: Any = build.load(simd.prelude() + source(spec), "ghost").ghost
    function.argtypes, function.restype = (ctypes.c_char_p,), None
    run: Callable[..., Any] = function
    return run
