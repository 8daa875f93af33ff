// Columns of linear layers whose weights are floats, for the rows of a decode step.

constexpr int GROUP = 8, TILE = 24;  // rows of x multiplied at a time; columns of y that one thread makes at a time

struct Rows {  // as they are
  const T* x;
  Rows(int64_t, int64_t) {}
  void enter(const T* rows) { x = rows; }
};

typedef void (*Product)(const T* x, const T* w, int64_t K, float* out);

template <int M> constexpr int SIDE = SUMS / M > SIDE_BY_SIDE ? SIDE_BY_SIDE : SUMS / M > 1 ? SUMS / M : 1;

template <int M, int R>
static void some(const T* x, const T* w, int64_t K, float* out) {
  products<M, R>(x, w, K, [=](int m, int r, float sum) { out[m * TILE + r] = sum; });
}

// The product of m rows with r rows of W: 1, or as many as fit beside m, or beside GROUP rows.
template <int M = GROUP>
static Product product(int m, int r) {
  if (m == M) return r == 1 ? some<M, 1> : r == SIDE<GROUP> ? some<M, SIDE<GROUP>> : some<M, SIDE<M>>;
  if constexpr (M > 1) return product<M - 1>(m, r);
  return nullptr;
}

template <int M = GROUP>
static int side(int m) {
  if (m >= M) return SIDE<M>;
  if constexpr (M > 1) return side<M - 1>(m);
  return 1;
}

// out[m, TILE] = columns n ... n + count of the linear layer, count <= TILE.
static void columns(const Rows& rows, int64_t m, const Linear& of, int64_t K, int64_t n, int count, float* out) {
  const T* x = rows.x;
  const int together = side((int)m);
  for (int c = 0; c < count;) {
    const int r = c + together <= count ? together : 1;
    for (int64_t i = 0; i < m; i += GROUP)
      product(m - i < GROUP ? (int)(m - i) : GROUP, r)(x + i * K, of.w + (n + c) * K, K, out + i * TILE + c);
    c += r;
  }
  if (of.bias)
    for (int64_t i = 0; i < m; i++)
      for (int c = 0; c < count; c++) out[i * TILE + c] += value(of.bias + n + c);
}

KV_INLINE int64_t tiles(int64_t N) { return (N + TILE - 1) / TILE; }
KV_INLINE int width_of(int64_t n, int64_t N) { return N - n < TILE ? (int)(N - n) : TILE; }
