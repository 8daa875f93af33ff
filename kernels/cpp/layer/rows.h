// What both kernels of a decoder layer are made of, beside products: norms, and what a linear layer is.
#include <memory>

#ifdef _OPENMP
extern "C" int omp_get_thread_num();
KV_INLINE int thread() { return omp_get_thread_num(); }
#else
KV_INLINE int thread() { return 0; }
#endif

struct Linear {  // y[m, N] = x[m, K] w^T + bias; bias may be null; scales and lows are those of weights in few bits
  const W* w;
  const T* bias;
  int64_t N;
  const fp16 *scales, *lows;
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
