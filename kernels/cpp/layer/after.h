// Behind the attention of a decoder layer: output projection, residual, norm, MLP, residual, for m new tokens.
//
//   s = x + c norm_a(a W_o^T + b_o),   y = s + c norm_m(h W_d^T + b_d),   h = act(z W_g^T + b_g) (z W_u^T + b_u),
//   z = norm(s); without a gate h = act(z W_u^T + b_u). norm_a and norm_m are there in some families only.
// Everything is in fp32 but z and h, which are rounded to T, and the result.

constexpr int MOST_ROWS = 32;

struct After {
  int64_t K, inner, attended;  // channels of x, of h, of what was attended
  double factor;               // c
  Linear output, gate, up, down;
  Norm output_norm, norm, down_norm;
};

// to[n] = act(gate[n]) up[n], n <= 16
KV_INLINE void activate(const float* gate, const float* up, T* to, int n) {
  F h = activation(load(gate, n));
  if constexpr (GATED) h = h * load(up, n);
  store(to, h, n);
}

// to[m, K] = x + c y, y normed first where there is such a norm
template <Formula kind, class X, class Y>
static void add(const Norm& by, const X* x, float* y, Y* to, float factor, int64_t K) {
  if constexpr (kind != NONE) normed<kind>(by, y, y, K);
  for (int64_t k = 0; k < K; k += 16) {
    const int n = K - k < 16 ? (int)(K - k) : 16;
    store(to + k, mul_add(load(y + k, n), set(factor), load(x + k, n)), n);
  }
}

extern "C" void after_attention(const After* of, const T* a, const T* x, T* y, int64_t m, int threads) {
  const int64_t K = of->K, inner = of->inner;
  const float factor = (float)of->factor;
  const int team = K * (of->attended + inner) > ALONE ? threads : 1;
  std::unique_ptr<float[]> sums(new float[m * K]), last(new float[m * K]);
  std::unique_ptr<T[]> states(new T[team * m * K]), h(new T[m * inner]);
#pragma omp parallel num_threads(team)
  {
    float out[MOST_ROWS * TILE], gates[MOST_ROWS * TILE];
    Rows attended(m, of->attended), middle(m, K), inside(m, inner);
    attended.enter(a);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < K; n += TILE) {
      const int count = width_of(n, K);
      columns(attended, m, of->output, of->attended, n, count, out);
      for (int64_t i = 0; i < m; i++) {
        memcpy(sums.get() + i * K + n, out + i * TILE, count * sizeof(float));
        if constexpr (OUTPUT_NORM == NONE)
          add<NONE>(of->output_norm, x + i * K + n, out + i * TILE, sums.get() + i * K + n, factor, count);
      }
    }
    if constexpr (OUTPUT_NORM != NONE) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < m; i++)
        add<OUTPUT_NORM>(of->output_norm, x + i * K, sums.get() + i * K, sums.get() + i * K, factor, K);
    }
    T* z = states.get() + thread() * m * K;
    for (int64_t i = 0; i < m; i++) normed<NORM>(of->norm, sums.get() + i * K, z + i * K, K);
    middle.enter(z);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < inner; n += TILE) {
      const int count = width_of(n, inner);
      if constexpr (GATED) columns(middle, m, of->gate, K, n, count, gates);
      columns(middle, m, of->up, K, n, count, out);
      for (int64_t i = 0; i < m; i++)
        for (int c = 0; c < count; c += 16)
          activate((GATED ? gates : out) + i * TILE + c, out + i * TILE + c, h.get() + i * inner + n + c,
                   count - c < 16 ? count - c : 16);
    }
    inside.enter(h.get());
#pragma omp for schedule(static)
    for (int64_t n = 0; n < K; n += TILE) {
      const int count = width_of(n, K);
      columns(inside, m, of->down, inner, n, count, out);
      for (int64_t i = 0; i < m; i++) {
        if constexpr (DOWN_NORM == NONE)
          add<NONE>(of->down_norm, sums.get() + i * K + n, out + i * TILE, y + i * K + n, factor, count);
        else memcpy(last.get() + i * K + n, out + i * TILE, count * sizeof(float));
      }
    }
    if constexpr (DOWN_NORM != NONE) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < m; i++)
        add<DOWN_NORM>(of->down_norm, sums.get() + i * K, last.get() + i * K, y + i * K, factor, K);
    }
  }
}
