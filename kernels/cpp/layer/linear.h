// One linear layer with weights in few bits: for the rows of a decode step, and its weights as floats.

constexpr int MOST_ROWS = 32;

// y[m, N] = x[m, K] W^T + bias, m <= MOST_ROWS
extern "C" void few_bits_linear(const Linear* of, const T* x, T* y, int64_t m, int64_t K, int threads) {
  const int64_t N = of->N;
  const int team = N * K > ALONE ? threads : 1;
#pragma omp parallel num_threads(team)
  {
    Rows rows(m, K);
    rows.enter(x);
    float out[MOST_ROWS * TILE];
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n += TILE) {
      const int count = width_of(n, N);
      columns(rows, m, *of, K, n, count, out);
      for (int64_t i = 0; i < m; i++)
        for (int c = 0; c < count; c += 16)
          store(y + i * N + n + c, load(out + i * TILE + c), count - c < 16 ? count - c : 16);
    }
  }
}

// to[N, K] = W
extern "C" void few_bits_floats(const Linear* of, T* to, int64_t K, int threads) {
  const int64_t N = of->N, groups = K / GROUPED;
#pragma omp parallel for num_threads(threads) schedule(static) if (N * K > ALONE)
  for (int64_t b = 0; b < (N + BLOCK - 1) / BLOCK; b++) {
    const int rows = N - b * BLOCK < BLOCK ? (int)(N - b * BLOCK) : BLOCK;
    for (int64_t g = 0; g < groups; g++) {
      float scale[BLOCK], low[BLOCK];
      const int64_t place = b * groups + g;
      store(scale, load(of->scales + place * BLOCK));
      store(low, BITS == 8 ? set(-(float)ZERO) * load(of->scales + place * BLOCK) : load(of->lows + place * BLOCK));
      for (int r = 0; r < rows; r++) {
        uint32_t fours[GROUPED / 4];
        for (int i = 0; i < BYTES / LINE; i++) {
          const uint32_t four = read<uint32_t>(of->w + place * BYTES + i * LINE + r * 4);
          if (BITS == 8) fours[i] = four;
          else fours[2 * i] = four & 0x0f0f0f0fu, fours[2 * i + 1] = (four >> 4) & 0x0f0f0f0fu;
        }
        T* row = to + (b * BLOCK + r) * K + g * GROUPED;
        const uint8_t* codes = (const uint8_t*)fours;
        for (int k = 0; k < GROUPED; k += 16) store(row + k, mul_add(load(codes + k), set(scale[r]), set(low[r])));
      }
    }
  }
}
