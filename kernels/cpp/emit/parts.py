"""One part of every row as a C++ struct: its arguments, its rows, and the loads that its formats need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from kvcompile.kernels.cpp.emit.address import LAYOUTS, TILE, Address, Paged
from kvcompile.kernels.cpp.emit.stored import ELEMENTS, FixedPoint, Stored, decimal, table
from kvcompile.kernels.cpp.emit.text import fill
from kvcompile.kernels.spec import KernelSpec

LOG2E = math.log2(math.e)

CONSTANTS = """
    typedef $query Query;              // queries and result
    constexpr int G = $group;          // query heads that share a KV head
    constexpr int D = $dim, DV = $value_dim;   // channels of keys, of values
    constexpr float QUERY_SCALE = $scale;
    #define UNROLL _Pragma("GCC unroll 16")
    KV_INLINE int least(int a, int b) { return a < b ? a : b; }
    KV_INLINE int most(int a, int b) { return a > b ? a : b; }
    // What is needed a tile later is asked for now: caches alone foresee neither columns nor pages.
    KV_INLINE void ahead(const void* p, int bytes) {
      UNROLL for (int i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i, 0, 2);
    }
    """

FIRST = """
    // The first entry at true position `at` or after: positions ascend along a part of a row.
    KV_INLINE int first(const Row& row, int64_t at) {
      int low = 0, high = row.count;
      while (low < high) {
        int middle = (low + high) / 2;
        if ($position < at) low = middle + 1;
        else high = middle;
      }
      return low;
    }
    """

SUMS = """
    float* sums;  // [rows, sums_row]: what each entry received is added
    int64_t sums_row;
    """

SINKS = "const float* sinks;  // logits of the query heads [heads * G]"

APART = """
    // The N scales and zeros of each entry of a tile, float16 in memory, as floats to[i][t], with zeros past the end.
    template <int N> KV_INLINE void apart(const fp16* from, int count, float* to) {
      for (int t = 0; t < count; t += 16, from += 16 * N) {
        fp16 last[16 * N];
        const fp16* p = from;
        if (count - t < 16) {
          memset(last, 0, sizeof last);
          p = (const fp16*)memcpy(last, from, (count - t) * N * sizeof(fp16));
        }
        if constexpr (N == 2) {
          F first, second;
          load_pairs(p, first, second);
          store(to + t, first);
          store(to + TILE + t, second);
        } else {
          float x[16 * N];
          for (int i = 0; i < N; i++) store(x + 16 * i, load(p + 16 * i));
          for (int i = 0; i < 16; i++)
            for (int k = 0; k < N; k++) to[k * TILE + t + i] = x[i * N + k];
        }
      }
    }
    """

GATHER = """
    fp16 ${name}s[$room * $n];  // page by page
    for (int i = 0; i < $room; i += $page)
      memcpy(${name}s + i * $n, row.${name}_scales + tile.at[i] * $n, $page * $n * sizeof(fp16));
    apart<$n>(${name}s + tile.skip * $n, count, tile.${name}_numbers);
    """


LOOK_UP = """
    // Sixteen codes of 4 bits, from bit `at` of sixteen bytes, as the levels that they stand for
    template <int at> KV_INLINE F look_up(const float* levels, const uint8_t* p) {
      I codes = widen(p) >> at;
    #if defined(KV_AVX512)
      return (F)_mm512_permutexvar_ps((__m512i)codes, read<__m512>(levels));  // looks at the last 4 bits of each lane
    #elif defined(KV_AVX2)
      __m256 low = read<__m256>(levels), high = read<__m256>(levels + 8);
      __m256i x[2] = {(__m256i)codes.lo, (__m256i)codes.hi};
      V8 y[2];
      for (int i = 0; i < 2; i++)  // the last 3 bits say where in each half, the one above them in which
        y[i] = (V8)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, x[i]), _mm256_permutevar8x32_ps(high, x[i]),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(x[i], 28)));
      return {y[0], y[1]};
    #else
      int32_t code[16];
      memcpy(code, &codes, sizeof code);
      float x[16];
      for (int i = 0; i < 16; i++) x[i] = levels[code[i] & 15];
      return read<F>(x);
    #endif
    }
    template <int at> KV_INLINE F look_up(const float* levels, const uint8_t* p, int n) {
      uint8_t part[16];
      load_part(part, p, n);
      return look_up<at>(levels, (const uint8_t*)part);
    }
    """

LEVELS = """
    alignas(64) static const float ${name}_levels[16] = {
      $levels
    };
    """

LOOK_UP_WHOLE = """
    // Codes of 4 bits, from bit `at` of every sixteen, as the levels that they stand for, in fixed point
    KV_INLINE C look_up(const int16_t* levels, C x, int at) {
    #if defined(KV_AVX512)
      return (C)_mm512_permutexvar_epi16((__m512i)(x >> at), read<__m512i>(levels));  // looks at the last 5 bits
    #elif defined(KV_AVX2)
      __m256i l = read<__m256i>(levels), last = _mm256_set1_epi16(255);  // bytes are looked up, in each half
      __m256i low = _mm256_permute4x64_epi64(_mm256_packus_epi16(_mm256_and_si256(l, last), l), 0x88);
      __m256i high = _mm256_permute4x64_epi64(_mm256_packus_epi16(_mm256_srli_epi16(l, 8), l), 0x88);
      C codes = field(x, at, 4);
      Twos<8>::V y[2] = {codes.lo, codes.hi};
      for (int i = 0; i < 2; i++) {
        __m256i below = _mm256_shuffle_epi8(low, (__m256i)y[i]), above = _mm256_shuffle_epi8(high, (__m256i)y[i]);
        y[i] = (Twos<8>::V)_mm256_or_si256(_mm256_and_si256(below, last), _mm256_slli_epi16(above, 8));
      }
      return {y[0], y[1]};
    #else
      uint16_t y[32];
      memcpy(y, &x, sizeof y);
      for (int i = 0; i < 32; i++) y[i] = (uint16_t)levels[y[i] >> at & 15];
      return read<C>(y);
    #endif
    }
    """

FIXED_POINT = """
    // Levels in steps of the largest by $most; twice, so that a fifth bit of a code changes nothing. Not a member of
    // what reads them: such constants of one name are shared by all libraries of a process.
    alignas(64) static const int16_t $name[32] = {
      $levels,
      $levels
    };
    """


def helpers(spec: KernelSpec, fixed: Sequence[FixedPoint | None] = ()) -> str:
    """What the scales and the tables of the spec's formats need.

    fixed: of the keys and the values of each part, levels that are looked up as whole numbers; None: as floats.
    """
    codecs = [c for p in spec.parts for c in (p.key, p.value)]
    read = (table(c) for c, x in zip_longest(codecs, fixed) if x is None)
    tables = {t.name: t for t in read if t}
    texts = [fill(APART)] if any(c.axis == "token" for c in codecs) else []
    texts += [fill(LOOK_UP)] if tables else []
    texts += [fill(LEVELS, name=n, levels=", ".join(map(decimal, t.levels))) for n, t in tables.items()]
    whole = list(dict.fromkeys(filter(None, fixed)))
    texts += [fill(LOOK_UP_WHOLE)] if whole else []
    texts += [fill(FIXED_POINT, name=x.array, most=x.most, levels=", ".join(map(str, x.levels))) for x in whole]
    return "\n".join(texts)


def base2(x: float) -> str:
    """A C++ float: what x is where exp(x) is written as 2^x."""
    return decimal(x * LOG2E)


def logit(spec: KernelSpec) -> str:
    """The logit of query q and entry j, for a comment."""
    plain, cap = f"q . k_j * {spec.scale:.9g}", spec.softcap
    return f"{cap:g} tanh({plain} / {cap:g})" if cap else plain


def fields(spec: KernelSpec) -> str:
    """Arguments that only some specs have: the sinks, and where column sums go."""
    return "\n".join([SINKS] * spec.sink + [fill(SUMS)] * spec.scores)


def total(spec: KernelSpec, weights: str) -> str:
    """What the weights of a query are divided by, for a comment: `weights` is their sum."""
    return f"(exp(sink) + {weights})" if spec.sink else weights


def constants(spec: KernelSpec, query: str) -> str:
    """Sizes and types that all of a kernel shares; `query` is the dtype of the queries."""
    return fill(
        CONSTANTS,
        query=ELEMENTS[query],
        group=spec.group,
        dim=spec.head_dim,
        value_dim=spec.value_dim,
        scale=decimal(spec.scale / spec.softcap if spec.softcap else spec.scale * LOG2E),
    )


def address(spec: KernelSpec, index: int, positions: bool) -> Address:
    """How part `index` of the spec's rows is found."""
    part = spec.parts[index]
    return LAYOUTS[part.layout](part, spec, positions)


def struct(index: int, where: Address, methods: str, values: bool = True) -> str:
    """`struct Part<index>`: fields in the order of `Address.pack`, `row(r)`, tiles of its entries, and `methods`.

    Without `values` nothing is read of them.
    """
    fields = "struct Tile {\n  int from, count;\n  $places\n  $numbers\n};"
    sides = (("key", where.key), ("value", where.value))[: 1 + values]
    return fill(
        """
        struct $name {  // $title
          $arguments

          struct Row {
            $pointers
            int count;
            $table
          };
          typedef $name Part;
          $row

          $tile
          $together
          KV_INLINE void open(Tile& tile, const Row& row, int from, int count) {
            tile.from = from, tile.count = count;
            $entries
            $widen
          }

          $methods
        };
        """,
        name=f"Part{index}",
        title=f"{_the(where)} keys {where.part.key.name}, values {where.part.value.name}",
        arguments=where.arguments,
        pointers=where.pointers(),
        table="const int32_t* table;" if where.part.layout == "paged" else "",
        row=where.row,
        tile=fill(fields + "\n", places=where.fields, numbers=_lines(_numbers(*side) for side in sides)),
        together=where.together,
        entries=where.entries,
        widen=_lines(_widened(*side, where) for side in sides),
        methods=methods,
    )


def _lines(texts: Iterable[str]) -> str:
    return "\n".join(filter(None, texts))


def _the(where: Address) -> str:
    return {
        "dense": "rows of one length:",
        "ragged": "row r is entries begins[r] : ends[r]:",
        "paged": f"rows in pages of {where.part.page} entries:",
    }[where.part.layout]


def _numbers(name: str, stored: Stored) -> str:
    if stored.codec.axis != "token":
        return ""
    return (
        f"alignas(64) float {name}_numbers[{stored.numbers} * TILE];  // scales{' and zeros' if stored.zeros else ''}"
    )


def _widened(name: str, stored: Stored, where: Address) -> str:
    if stored.codec.axis != "token":
        return ""
    n = stored.numbers
    if isinstance(where, Paged) and not where.contiguous:
        page = where.part.page
        return fill(GATHER, name=name, n=n, page=page, room=where.pages(TILE) * page)
    return f"apart<{n}>(row.{name}_scales + {where.entry('0')} * {n}, count, tile.{name}_numbers);"
