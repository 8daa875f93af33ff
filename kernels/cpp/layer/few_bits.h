// Columns of linear layers whose weights are in few bits (`kernels/reference/packed.py`), for the rows of a decode step.
//
// x is rounded to 8 bits by groups of 32 along K. The product of a group is exact, of whole numbers, in 16 lanes, one for
// each of the rows of W that lie together; it is multiplied by both scales and added in fp32. A sum runs along K in the
// same order whatever m and the threads are: a row does not depend on its batch.

constexpr int GROUPED = 32, BLOCK = 16, TILE = 32, AT_ONCE = 4;  // AT_ONCE: rows of x
constexpr int LINE = 64, BYTES = GROUPED * BLOCK * BITS / 8;      // of four codes of a block; of a group of it
constexpr int ZERO = 128;                                         // what codes of 8 bits are counted from

// Four codes of each of 16 rows, times four of x, added to 16 sums. CENTRED: codes of 8 bits are counted from ZERO there.
#if defined(KV_AVX512) && defined(__AVX512VNNI__)
constexpr bool CENTRED = false;
typedef __m512i Fours;
KV_INLINE Fours fours(const uint8_t* p) { return _mm512_loadu_si512(p); }
KV_INLINE Fours low_halves(Fours x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
KV_INLINE Fours high_halves(Fours x) { return low_halves(_mm512_srli_epi16(x, 4)); }
KV_INLINE I add_fours(I sum, Fours codes, const int8_t* x) {
  return (I)_mm512_dpbusd_epi32((__m512i)sum, codes, _mm512_set1_epi32(read<int32_t>(x)));
}
#elif defined(KV_AVX2)
constexpr bool CENTRED = BITS == 8;
typedef Pair<__m256i> Fours;
KV_INLINE Fours fours(const uint8_t* p) { return {read<__m256i>(p), read<__m256i>(p + 32)}; }
KV_INLINE __m256i low_halves(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
KV_INLINE Fours low_halves(Fours x) { return {low_halves(x.lo), low_halves(x.hi)}; }
KV_INLINE Fours high_halves(Fours x) {
  return {low_halves(_mm256_srli_epi16(x.lo, 4)), low_halves(_mm256_srli_epi16(x.hi, 4))};
}
KV_INLINE I8 add_fours(I8 sum, __m256i codes, __m256i x) {
  __m256i pairs;  // of 16 bits: none is too large, as no code of x is -128, and none of a centred w
  if constexpr (CENTRED) {
    codes = _mm256_xor_si256(codes, _mm256_set1_epi8((char)ZERO));
    pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(codes, x));
  } else {
    pairs = _mm256_maddubs_epi16(codes, x);
  }
  return sum + (I8)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
KV_INLINE I add_fours(I sum, Fours codes, const int8_t* x) {
  const __m256i four = _mm256_set1_epi32(read<int32_t>(x));
  return {add_fours(sum.lo, codes.lo, four), add_fours(sum.hi, codes.hi, four)};
}
#else
constexpr bool CENTRED = false;
struct Fours { uint8_t codes[LINE]; };
KV_INLINE Fours fours(const uint8_t* p) { return read<Fours>(p); }
KV_INLINE Fours low_halves(Fours x) {
  for (int i = 0; i < LINE; i++) x.codes[i] &= 15;
  return x;
}
KV_INLINE Fours high_halves(Fours x) {
  for (int i = 0; i < LINE; i++) x.codes[i] >>= 4;
  return x;
}
KV_INLINE I add_fours(I sum, Fours w, const int8_t* x) {
  int32_t lanes[BLOCK];
  memcpy(lanes, &sum, sizeof lanes);
  for (int i = 0; i < BLOCK; i++)
    for (int c = 0; c < 4; c++) lanes[i] += w.codes[4 * i + c] * x[c];
  return read<I>(lanes);
}
#endif

struct Rows {  // of x, rounded: codes of -127 ... 127, a scale and the sum of the codes a group
  int64_t m, K;
  std::unique_ptr<int8_t[]> codes;
  std::unique_ptr<float[]> scales, sums;
  Rows(int64_t m, int64_t K)
      : m(m), K(K), codes(new int8_t[m * K]), scales(new float[m * K / GROUPED]), sums(new float[m * K / GROUPED]) {}
  void enter(const T* x) {
    for (int64_t g = 0; g < m * K / GROUPED; g++) round(x + g * GROUPED, g);
  }
  void round(const T* x, int64_t g) {
    const F shift = set(12582912.0f);  // 1.5 * 2^23: the sum has no fraction left, and its last byte is the code
    F a = load(x), b = load(x + 16);
    const float most = largest(max(max(a, zero() - a), max(b, zero() - b)));
    const float finite = sum(a * zero() + b * zero());  // or NaN, which the largest may have passed over
    const F inverse = set(most > 0 ? 127.0f / most : 0.0f);
    a = held(a * inverse) + shift, b = held(b * inverse) + shift;
    store_bytes((uint8_t*)codes.get() + g * GROUPED, bits_as<U>(a) & unsigned_all(0xffu));
    store_bytes((uint8_t*)codes.get() + g * GROUPED + 16, bits_as<U>(b) & unsigned_all(0xffu));
    scales[g] = most / 127.0f + finite;
    sums[g] = sum((a - shift) + (b - shift));
  }
};

// out[M, TILE] = 16 columns that belong to block b of W, of rows i ... of x.
template <int M>
static void block(const Rows& x, int64_t i, const Linear& of, int64_t b, float* out) {
  const int64_t groups = x.K / GROUPED, place = b * groups;
  const uint8_t* w = of.w + place * BYTES;
  const fp16 *scales = of.scales + place * BLOCK, *lows = of.lows + place * BLOCK;
  F sums[M];
  for (int m = 0; m < M; m++) sums[m] = zero();
  for (int64_t g = 0; g < groups; g++, w += BYTES) {
    I dots[M];
    for (int m = 0; m < M; m++) dots[m] = all<I>(0);
    for (int at = 0; at < BYTES; at += LINE) {
      __builtin_prefetch((const char*)w + at + AHEAD, 0, 2);
      const Fours codes = fours(w + at);
      const int8_t* four = x.codes.get() + i * x.K + g * GROUPED + at * 8 / BITS / BLOCK;
      for (int m = 0; m < M; m++, four += x.K) {
        if constexpr (BITS == 8) {
          dots[m] = add_fours(dots[m], codes, four);
        } else {
          dots[m] = add_fours(dots[m], low_halves(codes), four);
          dots[m] = add_fours(dots[m], high_halves(codes), four + 4);
        }
      }
    }
    const F scale = load(scales + g * BLOCK);
    for (int m = 0; m < M; m++) {
      const float by = x.scales[(i + m) * groups + g], sum = x.sums[(i + m) * groups + g];
      const I dot = BITS == 8 && !CENTRED ? dots[m] - all<I>(ZERO * (int)sum) : dots[m];
      sums[m] = mul_add(to_float(dot), scale * set(by), sums[m]);
      if constexpr (BITS == 4) sums[m] = mul_add(load(lows + g * BLOCK), set(by * sum), sums[m]);
    }
  }
  for (int m = 0; m < M; m++) store(out + m * TILE, sums[m]);
}

// out[m, TILE] = columns n ... n + count of the linear layer, count <= TILE; n is where a block begins.
static void columns(const Rows& x, int64_t m, const Linear& of, int64_t, int64_t n, int count, float* out) {
  for (int c = 0; c < count; c += BLOCK) {
    const int64_t b = (n + c) / BLOCK;
    for (int64_t i = 0; i < m; i += AT_ONCE) {
      float* to = out + i * TILE + c;
      if (m - i == 1) block<1>(x, i, of, b, to);
      else if (m - i == 2) block<2>(x, i, of, b, to);
      else if (m - i == 3) block<3>(x, i, of, b, to);
      else block<AT_ONCE>(x, i, of, b, to);
    }
  }
  if (of.bias)
    for (int64_t i = 0; i < m; i++)
      for (int c = 0; c < count; c++) out[i * TILE + c] += value(of.bias + n + c);
}

KV_INLINE int64_t tiles(int64_t N) { return (N + TILE - 1) / TILE; }
KV_INLINE int width_of(int64_t n, int64_t N) { return N - n < TILE ? (int)(N - n) : TILE; }
