"""One part of every row as a C++ struct: its arguments, its rows, and the loads that its formats need."""

from __future__ import annotations

import math

from kvcompile.kernels.cpp.address import LAYOUTS, Address
from kvcompile.kernels.cpp.stored import ELEMENTS, Stored
from kvcompile.kernels.cpp.text import fill
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

WIDEN = """
    // Scales are float16 in memory. As floats they fill whole vectors, with zeros past the end.
    KV_INLINE void widen_all(const fp16* from, int n, float* to) {
      int i = 0;
      for (; i + 16 <= n; i += 16) store(to + i, load(from + i));
      if (i < n) store(to + i, load(from + i, n - i));
    }
    """

SPLIT = """
    // Pairs of a scale and a zero, apart.
    KV_INLINE void split_all(const fp16* from, int n, float* scale, float* zero) {
      for (int t = 0; t < n; t += 16, from += 32) {
        alignas(64) float pairs[32];
        int rest = 2 * (n - t);
        store(pairs, rest < 16 ? load(from, rest) : load(from));
        store(pairs + 16, rest < 32 ? load(from + 16, rest < 16 ? 0 : rest - 16) : load(from + 16));
        for (int i = 0; i < 16; i++) scale[t + i] = pairs[2 * i], zero[t + i] = pairs[2 * i + 1];
      }
    }
    """

WIDEN_PAGES = """
    for (int t = 0, run; t < count; t += run) {
      run = least(count - t, $page - (from + t) % $page);
      widen_all(row.${name}_scales + $entry * $n, run * $n, tile.${name}_numbers + t * $n);
    }
    """

GATHER = """
    fp16 ${name}s[TILE * $n];
    for (int t = 0; t < count; t++) memcpy(${name}s + t * $n, row.${name}_scales + $entry * $n, $n * sizeof(fp16));
    $call
    """


def helpers(spec: KernelSpec) -> str:
    """What the scales of the spec's formats need."""
    coded = [Stored(c, d) for p in spec.parts for c, d in ((p.key, spec.head_dim), (p.value, spec.value_dim))]
    wide = any(x.scales == "groups" or (x.scales == "token" and not x.zeros) for x in coded)
    pairs = any(x.scales == "token" and x.zeros for x in coded)
    return (fill(WIDEN) if wide else "") + (fill(SPLIT) if pairs else "")


def decimal(x: float) -> str:
    """A C++ float."""
    text = f"{x:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def logit(spec: KernelSpec) -> str:
    """The logit of query q and entry j, for a comment."""
    plain, cap = f"q . k_j * {spec.scale:.9g}", spec.softcap
    return f"{cap:g} tanh({plain} / {cap:g})" if cap else plain


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


def struct(index: int, where: Address, methods: str) -> str:
    """`struct Part<index>`: fields in the order of `Address.pack`, `row(r)`, tiles of its entries, and `methods`."""
    fields = "struct Tile {\n  int from, count;\n  $key\n  $value\n};"
    numbers = [_numbers(name, stored) for name, stored in (("key", where.key), ("value", where.value))]
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
        tile=fill(fields + "\n", key=numbers[0], value=numbers[1]),
        entries=where.entries,
        widen="\n".join(_widened(name, stored, where) for name, stored in (("key", where.key), ("value", where.value))),
        methods=methods,
    )


def _the(where: Address) -> str:
    return {
        "dense": "rows of one length:",
        "ragged": "row r is entries begins[r] : ends[r]:",
        "paged": f"rows in pages of {where.part.page} entries:",
    }[where.part.layout]


def _numbers(name: str, stored: Stored) -> str:
    if stored.scales == "groups":
        return f"float {name}_numbers[TILE * {stored.numbers} + 16];  // scales{' and zeros' if stored.zeros else ''}"
    if stored.scales == "token":
        return f"float {name}_scale[TILE]{f', {name}_zero[TILE]' if stored.zeros else ''};"
    return ""


def _widened(name: str, stored: Stored, where: Address) -> str:
    n = stored.numbers
    if stored.scales == "groups" and where.part.layout == "paged":
        return fill(WIDEN_PAGES, name=name, n=n, page=where.part.page, entry=where.entry("t"))
    if stored.scales == "groups":
        return f"widen_all(row.{name}_scales + {where.entry('0')} * {n}, count * {n}, tile.{name}_numbers);"
    if stored.scales != "token":
        return ""
    call = f"split_all({{}}, count, tile.{name}_scale, tile.{name}_zero);"
    if not stored.zeros:
        call = f"widen_all({{}}, count, tile.{name}_scale);"
    if where.part.layout == "paged":
        return fill(GATHER, name=name, n=n, entry=where.entry("t"), call=call.format(f"{name}s"))
    return call.format(f"row.{name}_scales + {where.entry('0')} * {n}")
