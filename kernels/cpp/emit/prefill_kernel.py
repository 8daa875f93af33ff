"""Source of a kernel for several new tokens of each sequence: prefill over a history, quantized, ragged or paged.

The same without values gives column sums alone: what entries received from the last tokens of a prompt, whose
attention was computed elsewhere.

Lanes are queries: 64 of them, of all heads of a group, go through a row's entries together. Keys and values are decoded
once a tile for all of them, logits and weights lie `[entry][query]`, so that neither side is ever transposed and the
softmax needs no sums across lanes. What a query sees of a part is one range of entries, since positions ascend.
Online softmax: Milakov and Gimelshein, arXiv 1805.02867; tiles of queries and keys: FlashAttention, arXiv 2205.14135.
"""

from __future__ import annotations

from kvcompile.kernels.cpp.emit.address import TILE, Address, aligned
from kvcompile.kernels.cpp.emit.dequantize import decoder
from kvcompile.kernels.cpp.emit.parts import FIRST, address, base2, constants, fields, helpers, logit, struct, total
from kvcompile.kernels.cpp.emit.prefill_columns import COLUMNS, KEEP, KEPT, LAUNCH_SCORES, RANGE, START
from kvcompile.kernels.cpp.emit.text import fill
from kvcompile.kernels.spec import KernelSpec

HEAD = """
    // $name, several new tokens
    $what
    // Logits are kept times log2(e): exp is then 2^x.
    #include <vector>

    $constants
    constexpr int TILE = $tile;    // entries from one step of the softmax to the next
    constexpr int LANES = 64;   // queries that go together
    constexpr float MASKED = -1e30f, NOTHING = -1e29f;  // a masked logit weighs nothing even where no other was seen
    #if defined(KV_AVX512)
    constexpr int DOWN = 4, ACROSS = 4;  // vectors of sums that stay in registers
    #else
    constexpr int DOWN = 2, ACROSS = 2;
    #endif
    $helpers

    $parts

    struct Arguments {
      const Query* q;
      int64_t q_sequence, q_head, q_token;
      $out
      int64_t rows, heads, count;  // rows = sequences * KV heads; new tokens of a sequence
      const int64_t* positions;    // true positions of the new tokens [sequences, count]
      int64_t position_sequence;
      const uint8_t* valid;        // which of them are real [sequences, count]; null: all
      int64_t threads;
      $sums
      $arguments
    };
    """

MULTIPLY = """
    // c[i][m] (+)= sum_k a[i * a_down + k * a_along] b[k][m] for i < down and `across` vectors of queries m
    template <int N, int V, bool ADD>
    KV_INLINE void product(const $number* a, int a_down, int a_along, const $number* b, float* c, int depth) {
      F sum[N][V];
      UNROLL for (int i = 0; i < N; i++)
        UNROLL for (int v = 0; v < V; v++) sum[i][v] = ADD ? load(c + i * LANES + v * 16) : zero();
      for (int k = 0; k < depth; k++) {
        $vector x[V];
        UNROLL for (int v = 0; v < V; v++) x[v] = held(load(b + k * LANES + v * 16));
        UNROLL for (int i = 0; i < N; i++) {
          $vector y = set(a[i * a_down + k * a_along]);
          UNROLL for (int v = 0; v < V; v++) sum[i][v] = mul_add(y, x[v], sum[i][v]);
        }
      }
      UNROLL for (int i = 0; i < N; i++)
        UNROLL for (int v = 0; v < V; v++) store(c + i * LANES + v * 16, sum[i][v]);
    }
    template <int V, bool ADD>
    static void strip(const $number* a, int a_down, int a_along, const $number* b, float* c, int down, int depth) {
      int i = 0;
      for (; i + DOWN <= down; i += DOWN)
        product<DOWN, V, ADD>(a + i * a_down, a_down, a_along, b, c + i * LANES, depth);
      for (; i < down; i++) product<1, V, ADD>(a + i * a_down, a_down, a_along, b, c + i * LANES, depth);
    }
    template <bool ADD>
    KV_INLINE void multiply(const $number* a, int a_down, int a_along, const $number* b, float* c, int down, int depth,
                            int across) {
      int v = 0;
      for (; v + ACROSS <= across; v += ACROSS)
        strip<ACROSS, ADD>(a, a_down, a_along, b + v * 16, c + v * 16, down, depth);
      for (; v < across; v++) strip<1, ADD>(a, a_down, a_along, b + v * 16, c + v * 16, down, depth);
    }
    """

BLOCK = """
    // Up to LANES queries and what is known of each so far: entries and channels lie down, queries across.
    struct Block {
      int row, across;    // vectors of queries in use
      int token[LANES];   // new token of each lane, -1 for none
      int head[LANES];    // head in the group
      alignas(64) float q[D * LANES]$sum, top[LANES], total[LANES];
      alignas(64) float to[LANES];  // the entries of the part that each lane sees end here
      $from_field
      int low, high;      // those that any sees
      int most_low, least_high;  // those that all see
      $kept
      alignas(64) float s[TILE * LANES], keys[TILE * D]$values;
    };

    // Queries `first` and after of a row, numbered token by token; false where none of them is real
    KV_INLINE bool arrange(const Arguments& a, Block& b, int row, int64_t first) {
      int64_t sequence = row / a.heads, head = row % a.heads * G;
      bool any = false;
      b.row = row;
      b.across = (least(LANES, (int)(a.count * G - first)) + 15) / 16;
      for (int i = 0; i < b.across * 16; i++) {
        int64_t token = (first + i) / G;
        bool real = token < a.count && (!a.valid || a.valid[sequence * a.count + token]);
        b.token[i] = real ? (int)token : -1, b.head[i] = (int)((first + i) % G);
        $first
        any |= real;
        const Query* q = a.q + sequence * a.q_sequence + (head + b.head[i]) * a.q_head + token * a.q_token;
        for (int c = 0; c < D; c += 16) {
          alignas(64) float x[16];
          store(x, real ? load(q + c$d_count) * set(QUERY_SCALE) : zero());
          for (int k = 0; k < least(16, D - c); k++) b.q[(c + k) * LANES + i] = x[k];
        }
      }
      $clear
      return any;
    }

    // Which entries of a part each lane sees: positions ascend, so that they are one range.
    template <class P> KV_INLINE void see(const Arguments& a, Block& b, const typename P::Row& row) {
      int last = -1, from = 0, to = 0;
      b.low = b.least_high = row.count, b.high = b.most_low = 0;
      for (int i = 0; i < b.across * 16; i++) {
        if (b.token[i] >= 0 && b.token[i] != last) {
          last = b.token[i];
          int64_t at = a.positions[b.row / a.heads * a.position_sequence + last];
          to = P::first(row, at + 1);
          $window_start
          b.low = least(b.low, from), b.most_low = most(b.most_low, from);
          b.high = most(b.high, to), b.least_high = least(b.least_high, to);
        }
        b.to[i] = (float)to;
        $from_keep
      }
    }

    KV_INLINE void mask(Block& b, int first, int count) {
      for (int t = 0; t < count; t++) {
        F at = set((float)(first + t));
        for (int v = 0; v < b.across * 16; v += 16) {
          F x = if_less(at, load(b.to + v), load(b.s + t * LANES + v), set(MASKED));
          $window_mask
          store(b.s + t * LANES + v, x);
        }
      }
    }

    // A step of the online softmax: logits become weights relative to the largest so far.
    KV_INLINE void softmax(Block& b, int count) {
      for (int v = 0; v < b.across * 16; v += 16) {
        F most = load(b.top + v);
        for (int t = 0; t < count; t++) most = max(most, load(b.s + t * LANES + v));
        F shrink = exp2_negative(load(b.top + v) - most), total = load(b.total + v) * shrink;
        for (int t = 0; t < count; t++) {
          F p = exp2_negative(load(b.s + t * LANES + v) - most);
          total += p;
          $weight
        }
        $shrink
        store(b.top + v, most);
        store(b.total + v, total);
      }
    }
    """

ATTEND = """
    // Entries [first, last) of a part
    template <class P>
    KV_INLINE void read(Block& b, const typename P::Row& row, int first, int last) {
      for (int from = first, count; from < last; from += count) {
        count = $count;
        typename P::Tile tile;
        P::open(tile, row, from, count);
        multiply<false>(P::decoded_keys(row, tile, b.keys), D, 1, b.q, b.s, count, D, b.across);
        $cap
        if (from < b.most_low || from + count > b.least_high) mask(b, from, count);
        $keep
        softmax(b, count);
        $accumulate
      }
      $range
    }

    template <class P> KV_INLINE void attend(const Arguments& a, const P& part, Block& b) {
      typename P::Row row = P::row(part, a.heads, b.row);
      see<P>(a, b, row);
      read<P>(b, row, b.low, b.high);
      $offset
    }
    """

WHAT = """
    // Attention of the new tokens of each sequence. For each query i, of any head of the group:
    //   out[i] = sum_j p_ij v_j / $total,   p_ij = exp($logit),   over the entries j that it sees.
    """

WHAT_WITHOUT_VALUES = """
    // What each entry j receives from the new tokens of each sequence, i being their queries of any head of the group:
    //   sums[j] += sum_i p_ij / $total,   p_ij = exp($logit),   over the entries that i sees.
    """

OUT = """
    Query* out;
    int64_t out_sequence, out_head, out_token;
    """

SHRINK = "for (int c = 0; c < DV; c++) store(b.sum + c * LANES + v, load(b.sum + c * LANES + v) * shrink);"
ACCUMULATE = "multiply<true>(P::decoded_values(row, tile, b.values), 1, DV, b.s, b.sum, DV, count, b.across);"

FINISH = """
    KV_INLINE void finish(const Arguments& a, const Block& b) {
      for (int i = 0; i < b.across * 16; i++) {
        if (b.token[i] < 0) continue;
        int64_t sequence = b.row / a.heads, head = b.row % a.heads * G + b.head[i];
        Query* out = a.out + sequence * a.out_sequence + head * a.out_head + b.token[i] * a.out_token;
        float share = b.total[i] > 0 ? 1 / b.total[i] : 0;  // a query that sees nothing gives zeros
        for (int c = 0; c < DV; c++) narrow(out + c, b.sum[c * LANES + i] * share);
      }
    }
    """

CAP = """
    for (int t = 0; t < count; t++)
      for (int v = 0; v < b.across * 16; v += 16) {
        float* s = b.s + t * LANES + v;
        store(s, tanh(load(s)) * set($cap));
      }
    """

ONE = """
    if (arrange(a, b, (int)(i % a.rows), (blocks - 1 - i / a.rows) * LANES)) {
      $start
      $attend
      $finish
      $columns
    }
    """

LAUNCH = """
    extern "C" void $function(const Arguments* arguments) {
      const Arguments& a = *arguments;
      int64_t blocks = (a.count * G + LANES - 1) / LANES, tasks = blocks * a.rows;
      int threads = (int)(tasks < a.threads ? tasks : a.threads);
    #pragma omp parallel num_threads(threads)
      {
        Block* block = new Block;
        Block& b = *block;
    #pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++) {  // the last queries see most: they go first
          $one
        }
        delete block;
      }
    }
    """


def arguments(spec: KernelSpec) -> list[Address]:
    """How the parts are packed, in their order, after the fields that `attention.py` packs."""
    return [address(spec, i, True) for i in range(len(spec.parts))]


def multiply(number: str = "float", vector: str = "F") -> str:
    """C++ text of the product of a matrix with queries that lie across, of one type of numbers and their vectors."""
    return fill(MULTIPLY, number=number, vector=vector)


def source(spec: KernelSpec, query: str, values: bool = True) -> str:
    """C++ text of the kernel for queries of dtype `query` (`float32`, `float16`, `bfloat16`), prelude excluded.

    Without `values`: of the one that gives column sums alone; the spec has `scores` then.
    """
    places = arguments(spec)
    head = fill(
        HEAD,
        name=spec.name,
        what=fill(
            WHAT if values else WHAT_WITHOUT_VALUES,
            logit=logit(spec),
            total=total(spec, "sum_j p_ij" if values else "sum_k p_ik"),
        ),
        constants=constants(spec, query),
        tile=TILE,
        helpers=helpers(spec),
        parts="\n\n".join(struct(i, where, _methods(where, values), values) for i, where in enumerate(places)),
        out=fill(OUT) if values else "",
        sums=fields(spec),
        arguments="\n".join(f"Part{i} part{i};" for i in range(len(places))),
    )
    return "\n".join((head, multiply(), _block(spec, values), _attend(spec, values), _launch(spec, values)))


def _methods(where: Address, values: bool) -> str:
    first = fill(FIRST, position=where.position("middle"))
    read = [("key", where.key), ("value", where.value)][: 1 + values]
    return "\n".join((first, *(decoder(name, stored, where) for name, stored in read)))


def _block(spec: KernelSpec, values: bool) -> str:
    window = spec.sliding_window
    nothing = "b.top[i] = NOTHING, b.total[i] = 0;"
    sink = f"b.top[i] = a.sinks[head + b.head[i]] * {base2(1)}, b.total[i] = 1;  // what goes to no value"
    hide = "x = if_less(at, load(b.from + v), set(MASKED), x);"
    return fill(
        BLOCK,
        d_count="" if spec.head_dim % 16 == 0 else ", least(16, D - c)",
        sum=", sum[DV * LANES]" if values else "",
        values=", values[TILE * DV]" if values else "",
        clear="memset(b.sum, 0, sizeof b.sum);" if values else "",
        weight="store(b.s + t * LANES + v, p);" if values else "",
        shrink=SHRINK if values else "",
        from_field="alignas(64) float from[LANES];  // and start here" if window else "",
        from_keep="b.from[i] = (float)from;" if window else "",
        kept=fill(KEPT, most=2 * len(spec.parts)) if spec.scores else "",
        window_start=f"from = P::first(row, at - {(window or 1) - 1});" if window else "",
        window_mask=hide if window else "",
        first=sink if spec.sink else nothing,
    )


def _attend(spec: KernelSpec, values: bool) -> str:
    cap = fill(CAP, cap=base2(spec.softcap)) if spec.softcap else ""
    count = "least(TILE, last - from)"
    text = fill(
        ATTEND,
        count=f"P::together(from, {count})" if any(map(aligned, spec.parts)) else count,
        cap=cap,
        keep=KEEP if spec.scores else "",
        accumulate=ACCUMULATE if values else "",
        range=RANGE if spec.scores else "",
        offset="b.offset += row.count;" if spec.scores else "",
    )
    return "\n".join((text, *([fill(FINISH)] if values else []), *([fill(COLUMNS)] if spec.scores else [])))


def _launch(spec: KernelSpec, values: bool) -> str:
    parts = range(len(spec.parts))

    def entries_of_row(row: str) -> str:
        return f"int64_t held = {' + '.join(f'Part{i}::row(a.part{i}, a.heads, {row}).count' for i in parts)};"

    one = fill(
        ONE,
        start=fill(START, entries_of_row=entries_of_row("b.row")) if spec.scores else "",
        attend="\n".join(f"attend(a, a.part{i}, b);" for i in parts),
        finish="finish(a, b);" if values else "",
        columns="add_columns(b, mine + (int64_t)b.row * a.sums_row);" if spec.scores else "",
    )
    function = "attend_chunk" if values else "window_sums"
    if spec.scores:
        return fill(LAUNCH_SCORES, function=function, one=one, entries_of_row=entries_of_row("r"))
    return fill(LAUNCH, function=function, one=one)
