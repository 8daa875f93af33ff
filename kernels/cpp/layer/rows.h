// What both kernels of a decoder layer are made of: norms, and columns of linear layers, for the rows of a decode step.
#include <memory>

#ifdef _OPENMP
extern "C" int omp_get_thread_num();
KV_INLINE int thread() { return omp_get_thread_num(); }
#else
KV_INLINE int thread() { return 0; }
#endif

constexpr int GROUP = 8, TILE = 24;  // rows of x multiplied at a time; columns of y that one thread makes at a time

struct Linear {  // y[m, N] = x[m, K] w^T + bias; bias may be null
  const T *w, *bias;
  int64_t N;
};
struct Norm {  // weight and bias may be null
  const T *weight, *bias;
  double eps;
};
enum Formula { NONE, RMS, RMS_PLUS_ONE, LAYER };  // RMS_PLUS_ONE: the weight is 1 + what is stored

// y[K] = norm(x[K]), in fp32 until it is stored.
template <Formula kind, class X, class Y>
static void normed(const Norm& by, const X* x, Y* y, int64_t K) {
  float mean = 0;
  if constexpr (kind == LAYER) {
    F total = zero();
    for (int64_t k = 0; k < K; k += 16) total += k + 16 <= K ? load(x + k) : load(x + k, (int)(K - k));
    mean = sum(total) / (float)K;
  }
  F squares = zero();
  for (int64_t k = 0; k < K; k += 16) {
    const int n = K - k < 16 ? (int)(K - k) : 16;
    F d = load(x + k, n) - set(mean);
    if (n < 16) d = keep(d, n, 0.0f);
    squares = mul_add(d, d, squares);
  }
  const F scale = set(1.0f / std::sqrt(sum(squares) / (float)K + (float)by.eps));
  for (int64_t k = 0; k < K; k += 16) {
    const int n = K - k < 16 ? (int)(K - k) : 16;
    F z = (load(x + k, n) - set(mean)) * scale;
    if (by.weight) {
      F weight = load(by.weight + k, n);
      z = z * (kind == RMS_PLUS_ONE ? weight + set(1.0f) : weight);
    }
    if (by.bias) z = z + load(by.bias + k, n);
    if (n == 16) store(y + k, z);
    else store(y + k, z, n);
  }
}

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
static void columns(const T* x, int64_t m, const Linear& of, int64_t K, int64_t n, int count, float* out) {
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
