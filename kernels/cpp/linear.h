// y[m, N] = x[m, K] W[N, K]^T + bias for the few rows of a decode step, K and N of any size, sums in fp32.

// Columns of y that belong to R rows of W.
template <int M, int R>
KV_INLINE void block(const T* x, const T* w, const T* bias, T* y, int64_t K, int64_t N) {
  products<M, R>(x, w, K, [=](int m, int r, float sum) {
    narrow(y + m * N + r, sum + (bias ? value(bias + r) : 0.0f));
  });
}

template <int M>
static void product(const T* x, const T* w, const T* bias, T* y, int64_t K, int64_t N, int threads) {
  constexpr int fit = SUMS / M, R = fit > SIDE_BY_SIDE ? SIDE_BY_SIDE : fit > 1 ? fit : 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (K * N > ALONE)
  for (int64_t b = 0; b < (N + R - 1) / R; b++) {
    int64_t n = b * R;
    if (n + R <= N) {
      block<M, R>(x, w + n * K, bias ? bias + n : bias, y + n, K, N);
    } else {
      for (; n < N; n++) block<M, 1>(x, w + n * K, bias ? bias + n : bias, y + n, K, N);
    }
  }
}
