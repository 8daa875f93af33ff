"""Choosing in C++: groups are scored as they stream by, the best ones found and their entries listed, in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvcompile.kernels import choose as reference
from kvcompile.kernels.choose import ChooseSpec, EntryTable, GroupTable, Places, chosen_lengths, spec_of
from kvcompile.kernels.cpp import build, simd
from kvcompile.kernels.cpp.emit.stored import ELEMENTS, Stored
from kvcompile.kernels.cpp.emit.text import fill
from kvcompile.kernels.pointers import address, opaque
from kvcompile.plan.recall import Agreement
from kvcompile.plan.storage import Codec

TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
NUMBERS = 16  # of a call, before those of its rows
SMALL = 1 << 16  # numbers of representatives below which one thread is faster than two
TASK_BYTES = 1 << 16  # of representatives that a thread takes at a time

SOURCE = """
    // $name
    // Which groups of entries each row reads: the best ones by
    //   $formula,
    // $agreed, until a budget of entries is met. The last one is cut; of equal ones the older is taken first.
    #include <vector>

    typedef $element Number;           // of queries and representatives
    constexpr int G = $group;          // query heads that share a KV head
    constexpr int D = $dim;            // channels
    constexpr int TOGETHER = $together;  // rows that choose alike
    constexpr int TASK = $task;        // groups that a thread scores at a time
    constexpr int N = $queries;        // queries that are scored apart: $apart
    constexpr int WIDTH = $width;      // D in whole vectors
    constexpr int QUERY = $parts * WIDTH, GROUP = $parts * D;
    #if defined(KV_AVX512)
    constexpr int ROWS = 4;            // queries whose sums stay in registers
    #else
    constexpr int ROWS = 2;
    #endif
    #define UNROLL _Pragma("GCC unroll 16")
    KV_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
    KV_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

    struct Call {
      const Number *queries, *representatives;  // [rows, G, D], [rows, room, GROUP]
      const int32_t *starts, *sizes;  // [rows, room]: a size of 0 is no group
      int32_t *entries, *slots;       // [rows, longest]: what is read, and where it lies; slots may be null
      int64_t* counts;                // [rows]
      const int64_t* begins;          // [rows]: the slot of the first entry of each
      const int32_t* table;           // [rows, pages], in place of them where rows lie in pages of `page`
      int64_t pages, page;
      int64_t rows, room, longest;
      int64_t first;                  // entries of a row before its groups
      int64_t threads;
      int64_t numbers[1];             // of each row the entries wanted, then the lengths, then where its groups end
    };

    // The queries of a row as they are multiplied: $arranged.
    KV_INLINE void arrange(const Number* states, float* q) {
      memset(q, 0, N * QUERY * sizeof(float));
      for (int g = 0; g < G; g++, states += D) {
        float* to = q + $place;
        UNROLL for (int c = 0; c < $runs; c++) {
          F x = $state;
          $arrange
        }
      }
    }

    // What M queries want of sixteen groups, the best of them for each (past the end the last group again): groups t,
    // t + 4, t + 8 and t + 12 at a time, so that the transposing sum leaves them in order. The next ones are fetched.
    template <int M> KV_INLINE F wanted(const Number* groups, int count, const float* q) {
      if constexpr (M > ROWS) {
        return max(wanted<ROWS>(groups, count, q), wanted<M - ROWS>(groups, count, q + ROWS * QUERY));
      } else {
        F four[M][4];
        for (int t = 0; t < 4; t++) {
          F sum[M][4] = {};
          const Number* r[4];
          UNROLL for (int i = 0; i < 4; i++) {
            r[i] = groups + least(t + 4 * i, count - 1) * GROUP;
            UNROLL for (int b = 0; b < GROUP * (int)sizeof(Number); b += 64)
              __builtin_prefetch((const char*)(r[i] + 16 * GROUP) + b, 0, 2);
          }
          UNROLL for (int c = 0; c < $runs; c++)
            UNROLL for (int i = 0; i < 4; i++) {
              $products
            }
          UNROLL for (int m = 0; m < M; m++) four[m][t] = quad(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
        }
        F best = sum16(four[0][0], four[0][1], four[0][2], four[0][3]);
        UNROLL for (int m = 1; m < M; m++) best = max(best, sum16(four[m][0], four[m][1], four[m][2], four[m][3]));
        return best;
      }
    }

    // Groups of a row.
    KV_INLINE int64_t groups(const Call& c, int64_t row) {
      const int32_t* sizes = c.sizes + row * c.room;
      int64_t count = c.room;
      while (count > 0 && sizes[count - 1] == 0) count--;
      return count;
    }

    KV_INLINE void score(const Call& c, int64_t row, int64_t from, float* scores) {
      int64_t to = least(from + TASK, groups(c, row));
      if (from >= to) return;
      alignas(64) float q[N * QUERY];
      arrange(c.queries + row * G * D, q);
      const Number* representatives = c.representatives + row * c.room * GROUP;
      for (int64_t g = from; g < to; g += 16) {
        int count = (int)least(16, to - g);
        store(scores + g, wanted<N>(representatives + g * GROUP, count, q), count);
      }
    }

    // Whole numbers in the order of the floats: a threshold is found by halving.
    KV_INLINE int32_t key(float x) {
      int32_t bits = bits_as<int32_t>(x + 0.0f);  // there is one zero
      return bits ^ ((bits >> 31) & 0x7fffffff);
    }

    // Entries of the groups whose keys are `least` or more.
    KV_INLINE int32_t held(const int32_t* keys, const int32_t* sizes, int64_t count, int32_t least) {
      int32_t sum = 0;
      for (int64_t g = 0; g < count; g++) sum += keys[g] >= least ? sizes[g] : 0;
      return sum;
    }

    // A key such that the groups that have a larger one hold less than what is wanted, those that have it too enough.
    KV_INLINE int32_t threshold(const int32_t* keys, const int32_t* sizes, int64_t count, int64_t wanted) {
      int64_t low = INT32_MAX, high = INT32_MIN;
      for (int64_t g = 0; g < count; g++) low = least(low, keys[g]), high = most(high, keys[g]);
      for (high++; high - low > 1;) {
        int64_t middle = low + (high - low) / 2, sum = held(keys, sizes, count, (int32_t)middle);
        if (sum == wanted) return (int32_t)middle;  // nothing is cut
        if (sum > wanted) low = middle;
        else high = middle;
      }
      return (int32_t)low;
    }

    KV_INLINE void ascend(int32_t* to, int64_t from, int64_t count) {
      for (int64_t i = 0; i < count; i++) to[i] = (int32_t)(from + i);
    }

    // Entries [from, from + count) of a row become those from number `at` on of what it reads; what comes after them.
    KV_INLINE int64_t list(const Call& c, int64_t row, int64_t at, int64_t from, int64_t count) {
      if (count <= 0) return at;
      ascend(c.entries + row * c.longest + at, from, count);
      if (!c.slots) return at + count;
      int32_t* to = c.slots + row * c.longest + at;
      if (!c.table) ascend(to, c.begins[row] + from, count);
      for (int64_t done = 0, part; c.table && done < count; done += part) {
        int64_t entry = from + done, skip = entry % c.page;
        part = least(count - done, c.page - skip);
        ascend(to + done, c.table[row * c.pages + entry / c.page] * c.page + skip, part);
      }
      return at + count;
    }

    // What a row reads, by the keys of its groups.
    KV_INLINE void write(const Call& c, int64_t row, const int32_t* keys, int64_t count) {
      const int32_t *sizes = c.sizes + row * c.room, *starts = c.starts + row * c.room;
      int64_t left = c.numbers[row], length = c.numbers[c.rows + row], end = c.numbers[2 * c.rows + row];
      int32_t cut = left > 0 ? threshold(keys, sizes, count, left) : INT32_MAX;
      for (int64_t g = 0; g < count; g++) left -= keys[g] > cut ? sizes[g] : 0;
      int64_t at = list(c, row, 0, 0, least(c.first, length));
      for (int64_t g = 0; g < count; g++) {
        if (keys[g] < cut) continue;
        int64_t taken = sizes[g];
        if (keys[g] == cut) taken = most(0, least(taken, left)), left -= taken;
        at = list(c, row, at, starts[g], taken);
      }
      c.counts[row] = at = list(c, row, at, end, length - end);
      for (; at < c.longest; at++) {
        c.entries[row * c.longest + at] = 0;
        if (c.slots) c.slots[row * c.longest + at] = 0;
      }
    }

    extern "C" void choose(const Call* call) {
      const Call& c = *call;
      static thread_local std::vector<float> memory;
      if ((int64_t)memory.size() < c.rows * c.room) memory.resize(c.rows * c.room);
      float* scores = memory.data();
      int64_t tasks = (c.room + TASK - 1) / TASK;
      #pragma omp parallel num_threads((int)c.threads)
      {
        static thread_local std::vector<int32_t> keys;
        if ((int64_t)keys.size() < c.room) keys.resize(c.room);
      #pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < c.rows * tasks; task++)
          score(c, task / tasks, task % tasks * TASK, scores + task / tasks * c.room);
      #pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < c.rows; row += TOGETHER) {
          int64_t count = groups(c, row);
          for (int64_t g = 0; g < count; g++) {
            float sum = 0;
            UNROLL for (int i = 0; i < TOGETHER; i++) sum += scores[(row + i) * c.room + g];
            keys[g] = key(sum);
          }
          for (int i = 0; i < TOGETHER; i++) write(c, row + i, keys.data(), count);
        }
      }
    }
    """

FORMULAS = {"vector": "q . r", "bounds": "sum_d max(q_d low_d, q_d high_d)"}
AGREED = {"mean": "q the queries of a KV head, in sum", "max": "the most that a query of a KV head wants"}
ARRANGED = {
    ("vector", "mean"): "added up, since their sum wants what they want in sum",
    ("vector", "max"): "one after the other",
    ("bounds", "mean"): "what is below zero of all, added up, then what is above",
    ("bounds", "max"): "of each what is below zero, then what is above",
}


def source(spec: ChooseSpec) -> str:
    """The C++ text of a spec, without the vectors that all share."""
    stored, bounds, alone = Stored(Codec(spec.dtype), spec.head_dim), spec.form == "bounds", spec.agree == "max"
    parts = ("min(x, zero())", "max(x, zero())") if bounds else ("x",)
    products, arrange = [], []
    for i, part in enumerate(parts):
        slot = f"{f'{i} * WIDTH + ' if i else ''}{stored.slot(0, 'c')}"
        (value,) = stored.codes(f"r[i]{f' + {i} * D' if i else ''}", "c")
        x = f"x{i or ''}"
        add = f"sum[m][i] = mul_add({x}, load(q + m * QUERY + {slot}), sum[m][i]);"
        products += [f"F {x} = ::held({value});", f"UNROLL for (int m = 0; m < M; m++) {add}"]
        arrange.append(f"store(to + {slot}, {part if alone else f'load(to + {slot}) + {part}'});")
    numbers = len(parts) * spec.head_dim
    return fill(
        SOURCE,
        name=spec.name,
        formula=FORMULAS[spec.form],
        agreed=AGREED[spec.agree],
        element=ELEMENTS[spec.dtype],
        group=spec.group,
        dim=spec.head_dim,
        together=spec.together,
        task=max(16, TASK_BYTES // (numbers * stored.codec.bits // 8) // 16 * 16),
        queries="G" if alone else "1",
        apart="all of a row" if alone else "their sum",
        width=stored.slots * 16,
        parts=len(parts),
        arranged=ARRANGED[spec.form, spec.agree],
        place="g * QUERY" if alone else "0",
        runs=stored.runs,
        state=stored.codes("states", "c")[0],
        arrange="\n".join(arrange),
        products="\n".join(products),
    )


@opaque
def choose(
    queries: Tensor,
    table: GroupTable,
    wanted: list[int],
    lengths: list[int],
    agree: Agreement,
    together: int = 1,
    places: Places | None = None,
) -> EntryTable:
    """Same contract as `kernels.choose.choose`, for queries on the CPU.

    Raises KvcompileError where queries and representatives are not of one dtype.
    """
    if queries.dtype not in TYPES:
        return reference.choose(queries, table, wanted, lengths, agree, together, places)
    queries, rows = queries.contiguous(), table.sizes.shape[0]
    totals, call = chosen_lengths(table, wanted, lengths), _prepared(queries, table, agree, together)
    longest = max(totals)
    entries = torch.empty(rows, longest, dtype=torch.int32, device="cpu")
    slots = None if places is None else torch.empty(rows, longest, dtype=torch.int32, device="cpu")
    counts = torch.empty(rows, dtype=torch.int64, device="cpu")
    numbers = [address("queries", queries, queries.dtype, (rows, *queries.shape[1:])), *call.table]
    numbers += [entries.data_ptr(), 0 if slots is None else slots.data_ptr(), counts.data_ptr(), *_where(places, rows)]
    threads = torch.get_num_threads() if call.large else 1
    numbers += [rows, table.sizes.shape[1], longest, table.first, threads, *wanted, *lengths, *table.ends]
    call.run(call.struct.pack(*numbers))
    return EntryTable(entries, totals, counts, slots)


@dataclass(frozen=True)
class Call:
    """What is the same of every choice among the groups of a table: looked at and packed once.

    table: where representatives, starts and sizes lie. large: whether several threads are worth it.
    """

    run: Callable[..., Any]
    table: tuple[int, ...]
    struct: Struct
    large: bool


_calls: WeakKeyDictionary[GroupTable, dict[Hashable, Call]] = WeakKeyDictionary()


def _prepared(queries: Tensor, table: GroupTable, agree: Agreement, together: int) -> Call:
    known, key = _calls.get(table), (queries.dtype, queries.shape[1:], agree, together)
    if known is None:
        known = _calls[table] = {}
    if key not in known:
        (rows, room), x = table.sizes.shape, table.representatives
        shape = (rows, room, *x.shape[2:-1], queries.shape[2])
        where = [address("representatives", x, queries.dtype, shape)]
        where += [address(name, getattr(table, name), torch.int32, (rows, room)) for name in ("starts", "sizes")]
        run = _kernel(spec_of(queries, table, agree, together))
        known[key] = Call(run, tuple(where), Struct(f"{NUMBERS + 3 * rows}q"), x.numel() > SMALL)
    return known[key]


def _where(places: Places | None, rows: int) -> list[int]:
    """The addresses of begins and table, its width, and the entries of a page."""
    if places is None:
        return [0, 0, 0, 0]
    where = places.rows
    if places.page:
        return [0, address("table", where, torch.int32, (rows, where.shape[-1]), (1,)), where.stride(0), places.page]
    return [address("begins", where, torch.int64, (rows,)), 0, 0, 0]


@lru_cache(maxsize=256)
def _kernel(spec: ChooseSpec) -> Callable[..., Any]:
    function: Any = build.load(simd.prelude() + source(spec), "choose").choose
    function.argtypes, function.restype = (ctypes.c_char_p,), None
    return function  # type: ignore[no-any-return]
