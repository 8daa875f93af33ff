"""Source of a decode kernel: attention of one new token of each sequence to what its rows hold.

Rows are cut into pieces that threads take as they come; each piece runs an online softmax over tiles of entries, and
the pieces of a row are merged in order. The group's query heads share every load of a key and a value.
Split rows and merge: Flash-Decoding; online softmax: Milakov and Gimelshein, arXiv 1805.02867; scales folded into
queries and weights: KIVI, arXiv 2402.02750.
"""

from __future__ import annotations

from kvcompile.kernels.cpp.emit import decode_keys, decode_values, integer_keys, integer_values
from kvcompile.kernels.cpp.emit.address import TILE, Address, aligned
from kvcompile.kernels.cpp.emit.parts import FIRST, address, base2, constants, fields, helpers, logit, struct, total
from kvcompile.kernels.cpp.emit.text import fill
from kvcompile.kernels.spec import KernelSpec

LONGEST_PIECE = 512
LONGEST_RUN = 16  # pieces that one thread takes at a time
SMALL = 1 << 18  # products below which one thread is faster than two

HEAD = """
    // $name
    // Attention of one new token per sequence, in one pass over its rows. For each query head g of a KV head:
    //   out[g] = sum_j p_j v_j / $total,   p_j = exp($logit),   over the entries j that the token sees.
    // Logits are kept times log2(e): exp is then 2^x.
    #include <vector>

    $constants
    constexpr int WIDTH = $width;      // DV in whole vectors
    constexpr int TILE = $tile;        // entries from one step of the softmax to the next
    constexpr int STRIDE = TILE + 16;  // floats between the logits of two query heads
    constexpr int LONGEST = $longest;  // entries of a piece of a row
    constexpr int RESULT = G * (WIDTH + 2);
    constexpr float MASKED = -1e30f;
    #if defined(KV_AVX512)
    constexpr int ROWS = 4;            // query heads whose sums stay in registers
    #else
    constexpr int ROWS = 2;
    #endif
    $helpers

    $parts

    struct Arguments {
      const Query* q;
      int64_t q_sequence, q_head;
      Query* out;           // [rows, G, DV]
      int64_t rows, heads;  // rows = sequences * KV heads
      const uint8_t* valid; // which sequences have a new token; null: all
      int64_t threads;
      $positions
      $sums
      $arguments
    };

    // One task: entries [from, to) of a part of a row. Its result: sums [G][WIDTH], largest logits [G], totals [G].
    struct Piece {
      int row, part, from, to;
      $place
    };
    """

SOFTMAX = """
    // A step of the online softmax: logits s[g][t] become weights relative to the largest so far.
    template <int N>
    KV_INLINE void softmax(float (&s)[G][STRIDE], int count, float (&top)[G], F (&total)[G],
                           float (&sum)[G][N]$kept_in) {
      int whole = (count + 15) / 16 * 16;
      for (int g = 0; g < G; g++) {
        for (int t = count; t < whole; t++) s[g][t] = MASKED;
        F most = set(top[g]);
        for (int t = 0; t < whole; t += 16) most = max(most, load(s[g] + t));
        float now = largest(most);
        if (now > top[g]) {
          F shrink = exp2_negative(set(top[g] - now));
          total[g] = total[g] * shrink;
          for (int c = 0; c < N; c += 16) store(sum[g] + c, load(sum[g] + c) * shrink);
          $shrink
          top[g] = now;
        }
        for (int t = 0; t < whole; t += 16) {
          F p = exp2_negative(load(s[g] + t) - set(now));
          total[g] += p;
          store(s[g] + t, p);
          $keep
        }
      }
    }
    """

ATTEND = """
    template <class P>
    KV_INLINE void attend(const Arguments& a, const P& part, const Piece& piece, float* result$kept_in) {
      typename P::Row row = P::row(part, a.heads, piece.row);
      const Query* states = a.q + piece.row / a.heads * a.q_sequence + piece.row % a.heads * G * a.q_head;
      typename P::Question q;
      for (int g = 0; g < G; g++) P::arrange(states + g * a.q_head, q, g);
      alignas(64) float s[G][STRIDE], sum[G][P::SUMS] = {};
      float top[G];
      F total[G];
      for (int g = 0; g < G; g++) top[g] = MASKED, total[g] = zero();
      for (int from = piece.from, count; from < piece.to; from += count) {
        count = $count;
        typename P::Tile tile;
        P::open(tile, row, from, count);
        P::logits(row, tile, q, s);
        $cap
        softmax(s, tile.count, top, total, sum$kept);
        P::accumulate(row, tile, s, sum);
      }
      for (int g = 0; g < G; g++) {
        P::finish(sum[g], result + g * WIDTH);
        result[G * WIDTH + g] = top[g];
        result[G * WIDTH + G + g] = ::sum(total[g]);
      }
    }
    """

CAP = """
    for (int g = 0; g < G; g++)
      for (int t = 0; t < tile.count; t += 16) store(s[g] + t, tanh(load(s[g] + t)) * set($cap));
    """

SHRINK = """
    for (int c = 0; c < done; c += 16) store(kept + g * columns + c, load(kept + g * columns + c) * shrink);
    """

MERGE = """
    // The result of a row from those of its pieces, weighted by 2^(largest logit of the piece - largest of all).
    KV_INLINE void merge(const float* results, int pieces, Query* out$shares_in$sinks_in) {
      for (int g = 0; g < G; g++) {
        float top = $least, total = 0;
        for (int i = 0; i < pieces; i++) top = fmaxf(top, results[i * RESULT + G * WIDTH + g]);
        $sink
        alignas(64) float sum[WIDTH] = {};
        for (int i = 0; i < pieces; i++) {
          const float* result = results + i * RESULT;
          float weight = exp2f(result[G * WIDTH + g] - top);
          total += weight * result[G * WIDTH + G + g];
          for (int c = 0; c < WIDTH; c += 16)
            store(sum + c, mul_add(set(weight), load(result + g * WIDTH + c), load(sum + c)));
        }
        F share = set(total > 0 ? 1 / total : 0);  // a row that shows nothing gives zeros
        $share
        for (int c = 0; c < DV; c += 16) store(out + g * DV + c, load(sum + c) * share$out_count);
      }
    }
    """

COLUMNS = """
    // Weights [G][columns()] of the pieces that a thread took, near it, until the totals of their rows are known.
    struct Kept {
      struct alignas(64) Line { float x[16]; };
      std::vector<Line> weights;
      std::vector<int64_t> pieces;
      size_t used = 0;
      float* add(int64_t piece, int count) {
        size_t start = used;
        pieces.push_back(piece), used += count / 16;
        if (weights.size() < used) weights.resize(used);
        return weights[start].x;
      }
      void clear() { pieces.clear(), used = 0; }
    };

    // What each entry of a piece received, sum_g p_j / total: kept weights are relative to the largest logit of the
    // piece, `result` has it, and `shares` the row's largest and 1 / total.
    KV_INLINE void add_columns(const Piece& piece, const float* kept, const float* result, const float (*shares)[2],
                               float* sums) {
      int count = piece.to - piece.from, columns = piece.columns();
      F share[G];
      for (int g = 0; g < G; g++) share[g] = set(exp2f(result[G * WIDTH + g] - shares[g][0]) * shares[g][1]);
      for (int t = 0; t < count; t += 16) {
        F x = zero();
        UNROLL for (int g = 0; g < G; g++) x = mul_add(load(kept + g * columns + t), share[g], x);
        if (count - t >= 16) store(sums + t, load(sums + t) + x);
        else store(sums + t, load(sums + t, count - t) + x, count - t);
      }
    }
    """

CUT = """
    // Pieces are cut by the length of the row alone, so that no result depends on the batch or on the threads:
    // short enough to balance, long enough for the merge to cost nothing.
    KV_INLINE void cut(std::vector<Piece>& pieces, int row, int part, int from, int to$place_in) {
      int length = ((to - from) / 8 + TILE - 1) / TILE * TILE;
      length = length < TILE ? TILE : least(length, LONGEST);
      for (int j = from; j < to; j += length) {
        pieces.push_back({row, part, j, least(j + length, to)$place});
      }
    }
    """

CUT_PART = """
    {
      Part$i::Row row = Part$i::row(a.part$i, a.heads, r);
      $seen
      $cuts
      $offset
    }
    """

LAUNCH = """
    extern "C" void attend_step(const Arguments* arguments) {
      const Arguments& a = *arguments;
      static thread_local std::vector<Piece> cuts;
      static thread_local std::vector<int> firsts;  // piece of each row
      static thread_local std::vector<float> memory;
      cuts.clear(), firsts.clear();
      for (int r = 0; r < a.rows; r++) {
        firsts.push_back((int)cuts.size());
        if (a.valid && !a.valid[r / a.heads]) continue;
        $offset
        $cuts
      }
      firsts.push_back((int)cuts.size());
      if (memory.size() < cuts.size() * RESULT) memory.resize(cuts.size() * RESULT);
      int64_t count = (int64_t)cuts.size(), work = 0;
      $shares
      const Piece* pieces = cuts.data();
      const int* first = firsts.data();
      float* results = memory.data();
      for (int i = 0; i < count; i++) work += pieces[i].to - pieces[i].from;
      int threads = work * (D + DV) * G < $small ? 1 : (int)a.threads;
      // neighbours go to one thread, which then reads memory in long stretches; but to each thread its share
      int run = most(1, least($longest_run, count / (4 * threads)));
      $run
    }
    """

RUN = """
    #pragma omp parallel for num_threads(threads) schedule(dynamic, run)
    for (int64_t i = 0; i < count; i++) {
      $dispatch
    }
    for (int64_t r = 0; r < a.rows; r++)  // little work: to wake threads for it would take longer
      merge(results + (int64_t)first[r] * RESULT, first[r + 1] - first[r], a.out + r * G * DV$sinks);
    """

RUN_SCORES = """
    auto take = [&](Kept& kept, int64_t i) {
      float* weights = kept.add(i, G * pieces[i].columns());
      $dispatch
    };
    auto merge_row = [&](int64_t r) {
      merge(results + (int64_t)first[r] * RESULT, first[r + 1] - first[r], a.out + r * G * DV, shares + r * G$sinks);
    };
    auto give = [&](Kept& kept) {
      if (kept.pieces.empty()) return;
      const float* weights = kept.weights.data()->x;
      for (int64_t i : kept.pieces) {
        const Piece& piece = pieces[i];
        float* sums = a.sums + piece.row * a.sums_row + piece.column;
        add_columns(piece, weights, results + i * RESULT, shares + piece.row * G, sums);
        weights += G * piece.columns();
      }
      kept.clear();
    };
    if (a.rows >= 4 * threads) {  // a row to a thread
    #pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
      for (int64_t r = 0; r < a.rows; r++) {
        static thread_local Kept kept;
        for (int64_t i = first[r]; i < first[r + 1]; i++) take(kept, i);
        merge_row(r);
        give(kept);
      }
      return;
    }
    #pragma omp parallel num_threads(threads)
    {
      static thread_local Kept kept;
    #pragma omp for schedule(dynamic, run)
      for (int64_t i = 0; i < count; i++) take(kept, i);
    #pragma omp single
      for (int64_t r = 0; r < a.rows; r++) merge_row(r);
      give(kept);
    }
    """

PLACE = """
    int column;  // of its first entry in the sums
    int columns() const { return (to - from + 30) / 16 * 16; }  // whole vectors from any entry on
    """

SHARES = """
    static thread_local std::vector<float> finals;
    if ((int64_t)finals.size() < a.rows * G * 2) finals.resize(a.rows * G * 2);
    float(*shares)[2] = (float(*)[2])finals.data();
    """


def arguments(spec: KernelSpec) -> list[Address]:
    """How the parts are packed, in their order, after the fields that `attention.py` packs."""
    return [address(spec, i, bool(spec.sliding_window)) for i in range(len(spec.parts))]


def source(spec: KernelSpec, query: str) -> str:
    """C++ text of the kernel for queries of dtype `query` (`float32`, `float16`, `bfloat16`), prelude excluded."""
    return "\n".join(
        (_head(spec, query, arguments(spec)), _softmax(spec), _attend(spec), _merge(spec), _cut(spec), _launch(spec))
    )


def _head(spec: KernelSpec, query: str, places: list[Address]) -> str:
    fixed = [x for p in places for x in (integer_keys.fixed_point(p.key), integer_values.fixed_point(p.value))]
    return fill(
        HEAD,
        name=spec.name,
        logit=logit(spec),
        total=total(spec, "sum_j p_j"),
        constants=constants(spec, query),
        width=-(-spec.value_dim // 16) * 16,
        tile=TILE,
        longest=LONGEST_PIECE,
        helpers=helpers(spec, fixed),
        parts="\n\n".join(struct(i, where, _methods(where, spec)) for i, where in enumerate(places)),
        positions="const int64_t* positions;  // of the new tokens [sequences]" if spec.sliding_window else "",
        sums=fields(spec),
        arguments="\n".join(f"Part{i} part{i};" for i in range(len(places))),
        place=fill(PLACE) if spec.scores else "",
    )


def _methods(where: Address, spec: KernelSpec) -> str:
    first = [fill(FIRST, position=where.position("middle"))] if where.positions else []
    keys = integer_keys if where.key.whole else decode_keys
    values = integer_values if integer_values.takes(where.value) else decode_values
    return "\n".join((*first, keys.logits(where), values.values(where, spec.group)))


def _softmax(spec: KernelSpec) -> str:
    return fill(
        SOFTMAX,
        kept_in=", float* kept, int columns, int done" if spec.scores else "",
        shrink=fill(SHRINK) if spec.scores else "",
        keep="store(kept + g * columns + done + t, p);" if spec.scores else "",
    )


def _attend(spec: KernelSpec) -> str:
    cap = spec.softcap
    count = "least(TILE, piece.to - from)"
    return fill(
        ATTEND,
        count=f"P::together(from, {count})" if any(map(aligned, spec.parts)) else count,
        kept_in=", float* kept" if spec.scores else "",
        cap=fill(CAP, cap=base2(cap)) if cap else "",
        kept=", kept, piece.columns(), from - piece.from" if spec.scores else "",
    )


def _merge(spec: KernelSpec) -> str:
    merge = fill(
        MERGE,
        shares_in=", float (*shares)[2]" if spec.scores else "",
        sinks_in=", const float* sinks" if spec.sink else "",
        least=f"sinks[g] * {base2(1)}" if spec.sink else "MASKED",
        sink=f"total = exp2f(sinks[g] * {base2(1)} - top);  // goes to no value" if spec.sink else "",
        share="shares[g][0] = top, shares[g][1] = total > 0 ? 1 / total : 0;" if spec.scores else "",
        out_count="" if spec.value_dim % 16 == 0 else ", least(16, DV - c)",
    )
    return merge + ("\n" + fill(COLUMNS) if spec.scores else "")


def _cut(spec: KernelSpec) -> str:
    return fill(CUT, place_in=", int offset", place=", offset + j") if spec.scores else fill(CUT, place_in="", place="")


def _cut_part(spec: KernelSpec, i: int) -> str:
    end = ", offset" if spec.scores else ""
    seen, cuts = "", f"cut(cuts, r, {i}, 0, row.count{end});"
    if spec.sliding_window:
        last = spec.sliding_window - 1
        seen = f"int seen = Part{i}::first(row, a.positions[r / a.heads] - {last});"
        cuts = f"cut(cuts, r, {i}, seen, row.count{end});"
    return fill(CUT_PART, i=i, seen=seen, cuts=cuts, offset="offset += row.count;" if spec.scores else "")


def _launch(spec: KernelSpec) -> str:
    count = len(spec.parts)
    end = ", weights" if spec.scores else ""
    calls = [f"attend(a, a.part{i}, pieces[i], results + i * RESULT{end});" for i in range(count)]
    cases = "\n".join(f"  case {i}: {call} break;" for i, call in enumerate(calls))
    return fill(
        LAUNCH,
        offset="int offset = 0;" if spec.scores else "",
        cuts="\n".join(_cut_part(spec, i) for i in range(count)),
        shares=fill(SHARES) if spec.scores else "",
        small=SMALL,
        longest_run=LONGEST_RUN,
        run=fill(
            RUN_SCORES if spec.scores else RUN,
            sinks=", a.sinks + r % a.heads * G" if spec.sink else "",
            dispatch=calls[0] if count == 1 else f"switch (pieces[i].part) {{\n{cases}\n}}",
        ),
    )
