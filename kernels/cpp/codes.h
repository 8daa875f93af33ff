
// ---- stored codes as whole numbers: `C`, two of 16 bits in each of sixteen lanes, multiplied and added in 32 ----
//
// A code below 2^8 is never made a float: floats that it is multiplied with become whole numbers instead, of 16 bits
// and one step for all of them. That is one instruction for 32 products (two of AVX2, four of NEON), and sums are
// exact: sixteen codes of 255 against 32767 leave room for 16 times as many in 32 bits.

template <int n> struct Twos { typedef uint16_t V __attribute__((vector_size(4 * n))); };
#if defined(KV_AVX512)
typedef Twos<16>::V C;
#elif defined(KV_AVX2)
typedef Pair<Twos<8>::V> C;
#else
typedef Pair<Pair<Twos<4>::V>> C;
#endif
typedef Twos<4>::V C4;

// Fields of `width` bits, from bit `at` of every sixteen.
KV_INLINE C field(C x, int at, int width) {
  if (at > 0) x = x >> at;
  if (at + width < 16) x = x & all<C>((uint16_t)((1 << width) - 1));  // the last field has nothing above it
  return x;
}

// sum + the products of the two numbers in every lane
#if defined(KV_AVX512)
KV_INLINE I dot(I sum, C a, C b) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  return sum + (I)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}
#elif defined(KV_AVX2)
KV_INLINE Lane<8>::I dot(Lane<8>::I sum, Twos<8>::V a, Twos<8>::V b) {
#if defined(__AVXVNNI__)
  return (Lane<8>::I)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#else
  return sum + (Lane<8>::I)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
#else
KV_INLINE I4 dot(I4 sum, C4 a, C4 b) {
#if defined(KV_NEON)
  int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return sum + (I4)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#elif defined(__SSE2__)
  return sum + (I4)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  typedef int16_t S4 __attribute__((vector_size(16)));
  S4 x = (S4)a, y = (S4)b;
  for (int i = 0; i < 4; i++) sum[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return sum;
#endif
}
#endif
template <class H, class D> KV_INLINE Pair<H> dot(Pair<H> sum, Pair<D> a, Pair<D> b) {
  return {dot(sum.lo, a.lo, b.lo), dot(sum.hi, a.hi, b.hi)};
}

// The first n bytes of a row, and zeros, in a register: what lies behind them may not be read.
template <class V, int n> KV_INLINE V first(const uint8_t* p) {
  if constexpr (n == sizeof(V)) return read<V>(p);
#if defined(KV_AVX512)
  else if constexpr (sizeof(V) == 16) return (V)_mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p);
  else if constexpr (sizeof(V) == 32) return (V)_mm256_maskz_loadu_epi8((__mmask32)((1ull << n) - 1), p);
#elif defined(KV_AVX2)
  else if constexpr (n == 16) return (V)_mm256_zextsi128_si256(read<__m128i>(p));
#endif
  else {
    V x = {};
    memcpy(&x, p, n);
    return x;
  }
}

// n <= 16 bytes of each of four rows, one block of lanes a row.
template <int n> KV_INLINE C four(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  C4 w = first<C4, n>(a), x = first<C4, n>(b), y = first<C4, n>(c), z = first<C4, n>(d);
#if defined(KV_AVX512)
  __m512i low = _mm512_inserti32x4(_mm512_castsi128_si512((__m128i)w), (__m128i)x, 1);
  return (C)_mm512_inserti32x4(_mm512_inserti32x4(low, (__m128i)y, 2), (__m128i)z, 3);
#elif defined(KV_AVX2)
  return {(Twos<8>::V)_mm256_set_m128i((__m128i)x, (__m128i)w), (Twos<8>::V)_mm256_set_m128i((__m128i)z, (__m128i)y)};
#else
  return {{w, x}, {y, z}};
#endif
}

// n <= 32 bytes of each of two rows: two bytes of the one and two of the other in every lane.
#if defined(KV_AVX512) || defined(KV_AVX2)
template <int n> KV_INLINE C zipped(const uint8_t* a, const uint8_t* b) {
  __m256i x = first<__m256i, n>(a), y = first<__m256i, n>(b);
#if defined(KV_AVX512)
  alignas(64) static const uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return (C)_mm512_permutex2var_epi16(_mm512_castsi256_si512(x), read<__m512i>(order), _mm512_castsi256_si512(y));
#else
  __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
  return {(Twos<8>::V)_mm256_permute2x128_si256(low, high, 0x20), (Twos<8>::V)_mm256_permute2x128_si256(low, high, 0x31)};
#endif
}
#else
KV_INLINE Pair<C4> zipped(C4 x, C4 y) {
#if defined(KV_NEON)
  return {(C4)vzip1q_u16((uint16x8_t)x, (uint16x8_t)y), (C4)vzip2q_u16((uint16x8_t)x, (uint16x8_t)y)};
#elif defined(__SSE2__)
  return {(C4)_mm_unpacklo_epi16((__m128i)x, (__m128i)y), (C4)_mm_unpackhi_epi16((__m128i)x, (__m128i)y)};
#else
  return {C4{x[0], y[0], x[1], y[1], x[2], y[2], x[3], y[3]}, C4{x[4], y[4], x[5], y[5], x[6], y[6], x[7], y[7]}};
#endif
}
template <int n> KV_INLINE C zipped(const uint8_t* a, const uint8_t* b) {
  if constexpr (n <= 16) return {zipped(first<C4, n>(a), first<C4, n>(b)), Pair<C4>{}};
  else return {zipped(read<C4>(a), read<C4>(b)), zipped(first<C4, n - 16>(a + 16), first<C4, n - 16>(b + 16))};
}
#endif

// The same sixteen bytes in every block of lanes; the same two numbers in every lane.
#if defined(KV_AVX512)
KV_INLINE C four(const int16_t* p) { return (C)_mm512_broadcast_i32x4(read<__m128i>(p)); }
KV_INLINE C two(const int16_t* p) { return (C)_mm512_set1_epi32(read<int32_t>(p)); }
#elif defined(KV_AVX2)
KV_INLINE C four(const int16_t* p) {
  Twos<8>::V x = (Twos<8>::V)_mm256_broadcastsi128_si256(read<__m128i>(p));
  return {x, x};
}
KV_INLINE C two(const int16_t* p) {
  Twos<8>::V x = (Twos<8>::V)_mm256_set1_epi32(read<int32_t>(p));
  return {x, x};
}
#else
KV_INLINE C four(const int16_t* p) {
  C4 x = read<C4>(p);
  return {{x, x}, {x, x}};
}
KV_INLINE C two(const int16_t* p) {
  C4 x = (C4)(I4{} + read<int32_t>(p));
  return {{x, x}, {x, x}};
}
#endif

// Floats below 2^22 as the nearest whole numbers.
KV_INLINE I whole(F x) {
#if defined(KV_AVX512)
  return (I)_mm512_cvtps_epi32((__m512)x);
#else
  return bits_as<I>(x + set(12582912.0f)) - all<I>(0x4b400000);  // 1.5 * 2^23: the sum has no fraction left
#endif
}

// Sixteen whole numbers below 2^15 as 16 bits; `apart`: those in even places before those in odd ones.
template <bool apart> KV_INLINE void store_whole(int16_t* p, I x) {
#if defined(KV_AVX512)
  if constexpr (apart) {
    alignas(64) static const uint16_t order[32] = {0, 2, 8, 10, 16, 18, 24, 26, 1, 3, 9, 11, 17, 19, 25, 27};
    __m512i packed = _mm512_packs_epi32((__m512i)x, (__m512i)x);
    _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(_mm512_permutexvar_epi16(read<__m512i>(order), packed)));
  } else _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(KV_AVX2)
  __m256i h = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)x.lo, (__m256i)x.hi), 0xd8);
  if constexpr (apart) {
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    h = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(h, _mm256_broadcastsi128_si256(order)), 0xd8);
  }
  write(p, h);
#else
  int32_t part[16];
  write(part, x);
  for (int i = 0; i < 16; i++) p[apart ? i / 2 + i % 2 * 8 : i] = (int16_t)part[i];
#endif
}

// x as whole numbers of at most `limit` times a step, even channels of a vector before odd ones; the step, which is NaN
// where x has anything that no whole number stands for.
template <int limit, int N> KV_INLINE float to_whole(const F (&x)[N], int16_t* to) {
  F most = zero(), total = zero();
  for (int i = 0; i < N; i++) most = max(most, max(x[i], zero() - x[i])), total += x[i];
  float top = largest(most), steps = top > 1e-30f ? limit / top : 0;
  for (int i = 0; i < N; i++) store_whole<true>(to + 16 * i, whole(x[i] * set(steps)));
  return top * (1.0f / limit) + 0 * sum(total);
}

// a[i] * b[i] / 2^15, rounded, for 32 whole numbers.
KV_INLINE void scaled(const int16_t* a, const int16_t* b, int16_t* to) {
#if defined(KV_AVX512)
  _mm512_storeu_si512(to, _mm512_mulhrs_epi16(read<__m512i>(a), read<__m512i>(b)));
#elif defined(KV_AVX2)
  for (int i = 0; i < 32; i += 16)
    _mm256_storeu_si256((__m256i*)(to + i), _mm256_mulhrs_epi16(read<__m256i>(a + i), read<__m256i>(b + i)));
#else
  for (int i = 0; i < 32; i++) to[i] = (int16_t)((a[i] * b[i] + (1 << 14)) >> 15);
#endif
}

// The first n of a[0], b[0], a[1], b[1], ...
KV_INLINE void store_zipped(float* p, F a, F b, int n) {
  float x[2][16];
  store(x[0], a), store(x[1], b);
  for (int i = 0; i < n; i++) p[i] = x[i % 2][i / 2];
}
