"""Column sums of a kernel for several new tokens: blocks keep their logits, threads have sums of their own."""

COLUMNS = """
    // What each entry received from the queries of a block: sum_i p_ij / total_i, the totals being known.
    KV_INLINE void add_columns(const Block& b, float* sums) {
      alignas(64) float share[LANES];
      for (int i = 0; i < b.across * 16; i++) share[i] = b.token[i] >= 0 && b.total[i] > 0 ? 1 / b.total[i] : 0;
      for (int r = 0; r < b.ranges; r++)
        for (int j = b.range[r][0]; j < b.range[r][1]; j++) {
          F x = zero();
          for (int v = 0; v < b.across * 16; v += 16)
            x += exp2_negative(load(b.kept + (int64_t)j * LANES + v) - load(b.top + v)) * load(share + v);
          sums[j] += sum(x);
        }
    }
    """

KEPT = """
    int offset, ranges, range[$most][2];  // entries before the part; those that were read, in the whole row
    float* kept;                          // their logits
    """

KEEP = "memcpy(b.kept + (int64_t)(b.offset + from) * LANES, b.s, (size_t)count * LANES * sizeof(float));"
RANGE = "b.range[b.ranges][0] = b.offset + first, b.range[b.ranges++][1] = b.offset + last;"

START = """
    $entries_of_row
    if ((int64_t)kept.size() < held * LANES) kept.resize(held * LANES);
    b.kept = kept.data(), b.offset = b.ranges = 0;
    """

LAUNCH_SCORES = """
    extern "C" void $function(const Arguments* arguments) {
      const Arguments& a = *arguments;
      int64_t blocks = (a.count * G + LANES - 1) / LANES, tasks = blocks * a.rows;
      int threads = (int)(tasks < a.threads ? tasks : a.threads);
      std::vector<float> partial((size_t)threads * a.rows * a.sums_row);
      // who adds what does not depend on who is free: sums come out the same every time
    #pragma omp parallel for num_threads(threads) schedule(static, 1)
      for (int t = 0; t < threads; t++) {
        Block* block = new Block;
        Block& b = *block;
        std::vector<float> kept;
        float* mine = partial.data() + (int64_t)t * a.rows * a.sums_row;
        for (int64_t i = t; i < tasks; i += threads) {
          $one
        }
        delete block;
      }
      for (int64_t r = 0; r < a.rows; r++) {
        $entries_of_row
        for (int t = 0; t < threads; t++)
          for (int64_t j = 0; j < held; j++) a.sums[r * a.sums_row + j] += partial[(t * a.rows + r) * a.sums_row + j];
      }
    }
    """
