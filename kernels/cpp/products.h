// Dot products of a few rows x[M, K] with rows of W[N, K], K of any size, sums in fp32.
//
// Each weight is read once, so the speed is that of memory. R rows of W are read side by side, and every line read asks
// for the one AHEAD of it to come into L2: the hardware's own prefetchers stop where a page ends, after a row or two.
// A sum runs along K in the same order whatever M, R and the threads are: a row does not depend on its batch.

constexpr int AHEAD = 32768;  // bytes
constexpr int64_t ALONE = 32768;  // weights that one thread has read by the time another would have started
#if defined(KV_AVX512)
constexpr int SUMS = 24, SIDE_BY_SIDE = 8;  // running sums that fit in the registers, most rows of W at a time
#else
constexpr int SUMS = 6, SIDE_BY_SIDE = 4;
#endif

// One step along K: STEP products, added lane by lane to a running sum. T is the type of x, W and y.
#if defined(KV_AVX512) && defined(__AVX512BF16__) && defined(T_IS_BF16)
constexpr int STEP = 32;  // two products a lane and instruction
typedef __m512bh Elements;
KV_INLINE Elements elements(const T* p) { return (Elements)_mm512_loadu_si512(p); }
KV_INLINE Elements elements(const T* p, int n) {
  return (Elements)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), p);
}
KV_INLINE F add_products(F sum, Elements a, Elements b) { return (F)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
constexpr int STEP = 16;
typedef F Elements;
KV_INLINE Elements elements(const T* p) { return load(p); }
KV_INLINE Elements elements(const T* p, int n) { return load(p, n); }
KV_INLINE F add_products(F sum, Elements a, Elements b) { return mul_add(a, b, sum); }
#endif

KV_INLINE float value(const T* p) {
  float first[16];
  store(first, load(p, 1));
  return first[0];
}

// done(m, r, sum) for every product of M rows of x with R rows of W.
template <int M, int R, class Done>
KV_INLINE void products(const T* x, const T* w, int64_t K, Done done) {
  constexpr int padded = (M * R + 3) / 4 * 4;
  F sums[padded];
  Elements rows[R];
  for (int i = 0; i < padded; i++) sums[i] = zero();
  int64_t k = 0;
  for (; k + STEP <= K; k += STEP) {
    for (int r = 0; r < R; r++) {
      const T* p = w + r * K + k;
      rows[r] = elements(p);
      __builtin_prefetch((const char*)p + AHEAD, 0, 2);
    }
    for (int m = 0; m < M; m++) {
      Elements a = elements(x + m * K + k);
      for (int r = 0; r < R; r++) sums[m * R + r] = add_products(sums[m * R + r], a, rows[r]);
    }
  }
  if (k < K) {
    int rest = (int)(K - k);
    for (int r = 0; r < R; r++) rows[r] = elements(w + r * K + k, rest);
    for (int m = 0; m < M; m++) {
      Elements a = elements(x + m * K + k, rest);
      for (int r = 0; r < R; r++) sums[m * R + r] = add_products(sums[m * R + r], a, rows[r]);
    }
  }
  float result[padded];
  for (int i = 0; i < padded; i += 4) {
    V4 four = sum4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
    memcpy(result + i, &four, sizeof four);
  }
  for (int r = 0; r < R; r++) {
    for (int m = 0; m < M; m++) done(m, r, result[m * R + r]);
  }
}
