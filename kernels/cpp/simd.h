// Sixteen floats at a time: `F`, one register of AVX-512, two of AVX2, or four of NEON, SSE or plain vector code.
//
// A kernel is written once, against F. `Lane<n>` is a register of n floats, `Pair` makes sixteen out of narrower ones.
// What GCC's and Clang's vector extensions compile well is written with them; intrinsics are left for widening,
// half floats and sums across lanes. Every CPU gives the same results up to rounding.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define KV_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KV_AVX2
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#define KV_NEON
#endif
#define KV_INLINE static inline __attribute__((always_inline))

// ---- element types: bits in memory, floats in registers ----

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };  // e4m3fn: no infinities, 0x7f and 0xff are NaN

// ---- registers ----

template <int n> struct Lane {
  typedef float V __attribute__((vector_size(4 * n)));
  typedef uint32_t U __attribute__((vector_size(4 * n)));
  typedef int32_t I __attribute__((vector_size(4 * n)));
};
typedef Lane<4>::V V4;
typedef Lane<8>::V V8;
typedef Lane<16>::V V16;

template <class H> struct Pair { H lo, hi; };

#define KV_PAIRWISE(op)                                                                                         \
  template <class H> KV_INLINE Pair<H> operator op(Pair<H> a, Pair<H> b) { return {a.lo op b.lo, a.hi op b.hi}; } \
  template <class H> KV_INLINE Pair<H>& operator op##=(Pair<H>& a, Pair<H> b) { return a = a op b; }
KV_PAIRWISE(+) KV_PAIRWISE(-) KV_PAIRWISE(*) KV_PAIRWISE(/) KV_PAIRWISE(&) KV_PAIRWISE(|)
#undef KV_PAIRWISE
template <class H> KV_INLINE Pair<H> operator<<(Pair<H> a, int n) { return {a.lo << n, a.hi << n}; }
template <class H> KV_INLINE Pair<H> operator>>(Pair<H> a, int n) { return {a.lo >> n, a.hi >> n}; }

#if defined(KV_AVX512)
typedef Lane<16>::V F;
typedef Lane<16>::U U;
typedef Lane<16>::I I;
#elif defined(KV_AVX2)
typedef Pair<Lane<8>::V> F;
typedef Pair<Lane<8>::U> U;
typedef Pair<Lane<8>::I> I;
#else
typedef Pair<Pair<Lane<4>::V>> F;
typedef Pair<Pair<Lane<4>::U>> U;
typedef Pair<Pair<Lane<4>::I>> I;
#endif

// ---- operations lane by lane: one definition for registers, one for pairs ----

template <class T> struct Kind { static constexpr bool pair = false; };
template <class H> struct Kind<Pair<H>> { static constexpr bool pair = true; typedef H half; };

template <class V, class T> KV_INLINE V all(T x) {
  if constexpr (Kind<V>::pair) return {all<typename Kind<V>::half>(x), all<typename Kind<V>::half>(x)};
  else return x - V{};  // the scalar goes to every lane
}
// From and to memory of any alignment, register by register: a pair that is copied whole goes through the stack in
// pieces of 16 bytes, and to load two of them as one register waits for both.
template <class V> KV_INLINE V read(const void* p) {
  if constexpr (Kind<V>::pair) {
    typedef typename Kind<V>::half Half;
    return {read<Half>(p), read<Half>((const char*)p + sizeof(Half))};
  } else {
    V x;
    memcpy(&x, p, sizeof x);
    return x;
  }
}
template <class V> KV_INLINE void write(void* p, V x) {
  if constexpr (Kind<V>::pair) write(p, x.lo), write((char*)p + sizeof(x.lo), x.hi);
  else memcpy(p, &x, sizeof x);
}
template <class To, class From> KV_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "bits are kept");
  if constexpr (Kind<To>::pair)
    return {bits_as<typename Kind<To>::half>(x.lo), bits_as<typename Kind<To>::half>(x.hi)};
  else return read<To>(&x);
}
template <class V> KV_INLINE V max(V a, V b) {
  if constexpr (Kind<V>::pair) return {max(a.lo, b.lo), max(a.hi, b.hi)};
  else return a > b ? a : b;
}
template <class V> KV_INLINE V min(V a, V b) {
  if constexpr (Kind<V>::pair) return {min(a.lo, b.lo), min(a.hi, b.hi)};
  else return a < b ? a : b;
}
template <class V> KV_INLINE V if_less(V a, V b, V then, V otherwise) {  // a < b ? then : otherwise
  if constexpr (Kind<V>::pair)
    return {if_less(a.lo, b.lo, then.lo, otherwise.lo), if_less(a.hi, b.hi, then.hi, otherwise.hi)};
  else return a < b ? then : otherwise;
}
// One rounding. Left to -ffp-contract=fast, GCC fuses in some of the copies of a loop and not in others, and a row of a
// batch would differ from the row alone.
template <class V> KV_INLINE V mul_add(V a, V b, V c) {
  if constexpr (Kind<V>::pair) return {mul_add(a.lo, b.lo, c.lo), mul_add(a.hi, b.hi, c.hi)};
#if defined(KV_AVX512)
  else if constexpr (sizeof(V) == 64) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if defined(KV_AVX512) || defined(KV_AVX2)
  else if constexpr (sizeof(V) == 32) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
  else return a * b + c;
}

KV_INLINE F set(float x) { return all<F>(x); }
KV_INLINE F zero() { return all<F>(0.0f); }
KV_INLINE U unsigned_all(uint32_t x) { return all<U>(x); }
KV_INLINE F lanes() {  // 0, 1, ..., 15
  alignas(64) static const float index[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return read<F>(index);
}
KV_INLINE F keep(F x, int n, float other) { return if_less(lanes(), set((float)n), x, set(other)); }  // lanes < n

// ---- whole numbers from memory to lanes of 32 bits, and to floats ----

#if defined(KV_AVX512)
KV_INLINE I widen(const uint8_t* p) { return (I)_mm512_cvtepu8_epi32(read<__m128i>(p)); }
KV_INLINE I widen(const int8_t* p) { return (I)_mm512_cvtepi8_epi32(read<__m128i>(p)); }
KV_INLINE I widen(const uint16_t* p) { return (I)_mm512_cvtepu16_epi32(read<__m256i>(p)); }
KV_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
#elif defined(KV_AVX2)
typedef Lane<8>::I I8;
KV_INLINE I8 widen8(const uint8_t* p) { return (I8)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
KV_INLINE I8 widen8(const int8_t* p) { return (I8)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
KV_INLINE I8 widen8(const uint16_t* p) { return (I8)_mm256_cvtepu16_epi32(read<__m128i>(p)); }
template <class T> KV_INLINE I widen(const T* p) { return {widen8(p), widen8(p + 8)}; }
KV_INLINE F to_float(I x) { return {__builtin_convertvector(x.lo, V8), __builtin_convertvector(x.hi, V8)}; }
#else
typedef Lane<4>::I I4;
#if defined(KV_NEON)
KV_INLINE I4 widen4(const uint8_t* p) {
  return (I4)vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(read<uint32_t>(p))))));
}
KV_INLINE I4 widen4(const int8_t* p) {
  return (I4)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(read<uint32_t>(p))))));
}
KV_INLINE I4 widen4(const uint16_t* p) { return (I4)vmovl_u16(vld1_u16(p)); }
#else
template <class T> KV_INLINE I4 widen4(const T* p) { return I4{p[0], p[1], p[2], p[3]}; }
#endif
template <class T> KV_INLINE I widen(const T* p) {
  return {{widen4(p), widen4(p + 4)}, {widen4(p + 8), widen4(p + 12)}};
}
KV_INLINE F to_float(I x) {
  return {{__builtin_convertvector(x.lo.lo, V4), __builtin_convertvector(x.lo.hi, V4)},
          {__builtin_convertvector(x.hi.lo, V4), __builtin_convertvector(x.hi.hi, V4)}};
}
#endif

// Whole numbers below 2^16 and 2^8 of sixteen lanes, as 16 and 8 bits each.
#if defined(KV_AVX512) || defined(KV_AVX2)
KV_INLINE __m256i halves(U x) {
#if defined(KV_AVX512)
  return _mm512_cvtepi32_epi16((__m512i)x);
#else  // packed within 128 bits
  return _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)x.lo, (__m256i)x.hi), 0xd8);
#endif
}
KV_INLINE void store_halves(void* p, U x) { write(p, halves(x)); }
KV_INLINE void store_bytes(uint8_t* p, U x) {
#if defined(KV_AVX512)
  write(p, _mm512_cvtepi32_epi8((__m512i)x));
#else
  __m256i h = halves(x);
  write(p, _mm_packus_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
#endif
}
#else
template <class T> KV_INLINE void store_lanes(T* p, U x) {
  uint32_t part[16];
  write(part, x);
  for (int i = 0; i < 16; i++) p[i] = (T)part[i];
}
KV_INLINE void store_halves(void* p, U x) { store_lanes((uint16_t*)p, x); }
KV_INLINE void store_bytes(uint8_t* p, U x) { store_lanes(p, x); }
#endif

// The same, held in registers: GCC would rather load an operand of many products again for each of them.
template <class V> KV_INLINE V held(V x) {
  if constexpr (Kind<V>::pair) return {held(x.lo), held(x.hi)};
#if defined(KV_AVX512)
  else asm("" : "+v"(x));
#elif defined(__SSE__)
  else asm("" : "+x"(x));
#elif defined(KV_NEON)
  else asm("" : "+w"(x));
#endif
  return x;
}

// ---- load: sixteen elements of any type as floats; with a count n <= 16, n of them and zeros ----

KV_INLINE F load(const float* p) { return read<F>(p); }
KV_INLINE F load(const uint8_t* p) { return to_float(widen(p)); }
KV_INLINE F load(const int8_t* p) { return to_float(widen(p)); }
KV_INLINE F load(const bf16* p) { return bits_as<F>(widen(&p->bits) << 16); }

// A float of e exponent and m mantissa bits, moved to where fp32 has them, is too small by 2^(127 - bias): one product
// puts that right, subnormals included. An exponent of all ones (e4m3fn: all bits ones) is made that of fp32.
KV_INLINE U moved(U x, int sign_left, int left, uint32_t magnitude) {
  return ((x << sign_left) & unsigned_all(0x80000000u)) | ((x << left) & unsigned_all(magnitude));
}
KV_INLINE F fp16_from_bits(U x) {
  U special = bits_as<U>(if_less(to_float(bits_as<I>(x & unsigned_all(0x7c00u))), set(31744.0f), zero(), set(INFINITY)));
  return bits_as<F>(bits_as<U>(bits_as<F>(moved(x, 16, 13, 0x0fffe000u)) * set(0x1p112f)) | special);
}
KV_INLINE F load(const e4m3* p) {
  U x = bits_as<U>(widen(&p->bits));
  F magnitude = to_float(bits_as<I>(x & unsigned_all(0x7fu)));
  U special = bits_as<U>(if_less(magnitude, set(127.0f), zero(), set(NAN)));
  return bits_as<F>(bits_as<U>(bits_as<F>(moved(x, 24, 20, 0x07f00000u)) * set(0x1p120f)) | special);
}
#if defined(KV_AVX512)
KV_INLINE F load(const fp16* p) { return (F)_mm512_cvtph_ps(read<__m256i>(p)); }
#elif defined(KV_AVX2)
KV_INLINE F to_floats(__m256i x) {  // of half floats
  return {(V8)_mm256_cvtph_ps(_mm256_castsi256_si128(x)), (V8)_mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
KV_INLINE F load(const fp16* p) { return to_floats(read<__m256i>(p)); }
#elif defined(KV_NEON)
KV_INLINE V4 half4(const fp16* p) { return (V4)vcvt_f32_f16(read<float16x4_t>(p)); }
KV_INLINE F load(const fp16* p) { return {{half4(p), half4(p + 4)}, {half4(p + 8), half4(p + 12)}}; }
#else
KV_INLINE F load(const fp16* p) { return fp16_from_bits(bits_as<U>(widen(&p->bits))); }
#endif

// Sixteen pairs of half floats, the first of each and the second of each.
KV_INLINE void load_pairs(const fp16* p, F& first, F& second) {
#if defined(KV_AVX512)
  U pairs = read<U>(p);
  first = (F)_mm512_cvtph_ps(halves(pairs));
  second = (F)_mm512_cvtph_ps(halves(pairs >> 16));
#elif defined(KV_AVX2)
  U pairs = read<U>(p);
  first = to_floats(halves(pairs & unsigned_all(0xffffu)));
  second = to_floats(halves(pairs >> 16));
#else
  float x[32], y[32];
  write(x, load(p)), write(x + 16, load(p + 16));
  for (int i = 0; i < 16; i++) y[i] = x[2 * i], y[16 + i] = x[2 * i + 1];
  first = read<F>(y), second = read<F>(y + 16);
#endif
}

// Sixteen fields of `width` bits, starting at bit `at` of sixteen bytes: int4 and int2 as 0 ... 2^width - 1.
template <int at, int width> KV_INLINE F load_field(const uint8_t* p) {
  U x = bits_as<U>(widen(p)) >> at;
  if constexpr (at + width < 8) x = x & unsigned_all((1u << width) - 1);  // the last field has nothing above it
  return to_float(bits_as<I>(x));
}

template <class T> KV_INLINE void load_part(T* part, const T* p, int n) {
  memset(part, 0, 16 * sizeof(T));
  for (int i = 0; i < n; i++) part[i] = p[i];
}
template <class T> KV_INLINE F load(const T* p, int n) {
#if defined(KV_AVX512)
  __mmask16 mask = (__mmask16)((1u << n) - 1);
  if constexpr (sizeof(T) == 4) return (F)_mm512_maskz_loadu_ps(mask, p);
  alignas(32) T part[16];
  if constexpr (sizeof(T) == 2) _mm256_store_si256((__m256i*)part, _mm256_maskz_loadu_epi16(mask, p));
  if constexpr (sizeof(T) == 1) _mm_store_si128((__m128i*)part, _mm_maskz_loadu_epi8(mask, p));
#else
  if (n == 16) return load(p);
  T part[16];
  load_part(part, p, n);
#endif
  return load((const T*)part);
}
template <int at, int width> KV_INLINE F load_field(const uint8_t* p, int n) {
  uint8_t part[16];
  load_part(part, p, n);
  return load_field<at, width>((const uint8_t*)part);
}

// ---- store: floats as elements of any float type, rounded to nearest, ties to even ----

KV_INLINE void narrow(float* p, float x) { *p = x; }
KV_INLINE void narrow(bf16* p, float x) {
  uint32_t u = bits_as<uint32_t>(x);
  p->bits = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
KV_INLINE void narrow(fp16* p, float x) {
  uint32_t u = bits_as<uint32_t>(x), sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) u = 0x7e00u;
  else if (u >= 0x477ff000u) u = 0x7c00u;  // 65520 and more
  else if (u < 0x38800000u) u = bits_as<uint32_t>(bits_as<float>(u) + 0.5f) - 0x3f000000u;  // subnormal: the sum rounds
  else u = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  p->bits = (uint16_t)(u | sign);
}
KV_INLINE void store(float* p, F x) { write(p, x); }
KV_INLINE void store(bf16* p, F x) {
  U u = bits_as<U>(x), rounded = (u + unsigned_all(0x7fffu) + ((u >> 16) & unsigned_all(1u))) >> 16;
  I size = bits_as<I>(u & unsigned_all(0x7fffffffu));
  store_halves(p, bits_as<U>(if_less(all<I>(0x7f800000), size, all<I>(0x7fc0), bits_as<I>(rounded))));
}
KV_INLINE void store(fp16* p, F x) {
#if defined(KV_AVX512)
  write(p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(KV_AVX2)
  write(p, _mm256_cvtps_ph((__m256)x.lo, _MM_FROUND_TO_NEAREST_INT));
  write(p + 8, _mm256_cvtps_ph((__m256)x.hi, _MM_FROUND_TO_NEAREST_INT));
#else
  float part[16];
  write(part, x);
  for (int i = 0; i < 16; i++) narrow(p + i, part[i]);
#endif
}
template <class T> KV_INLINE void store(T* p, F x, int n) {
  if (n == 16) return store(p, x);
  T part[16];
  store(part, x);
  for (int i = 0; i < n; i++) p[i] = part[i];
}

// Codes from 0 to `most`: rounded to nearest, ties to even, one in each lane; and lanes below 256 as bytes.
KV_INLINE U round_to_code(F x, float most) {
  const F shift = set(12582912.0f);  // 1.5 * 2^23: the sum has no fraction left
  x = max(min((x + shift) - shift, set(most)), zero());
  return bits_as<U>(x + set(8388608.0f)) & unsigned_all(0xffu);
}
KV_INLINE void store_bytes(uint8_t* p, U x, int n) {
  if (n == 16) return store_bytes(p, x);
  uint8_t part[16];
  store_bytes(part, x);
  for (int i = 0; i < n; i++) p[i] = part[i];
}

KV_INLINE void store(e4m3* p, F x, int n = 16) {  // of magnitude 448 at most
  U u = bits_as<U>(x) & unsigned_all(0x7fffffffu), sign = (bits_as<U>(x) >> 24) & unsigned_all(0x80u);
  F size = bits_as<F>(u);
  U subnormal = bits_as<U>(size + set(16384.0f)) - unsigned_all(0x46800000u);  // the sum rounds
  U normal = (u - unsigned_all(0x3bf80001u) + ((u >> 20) & unsigned_all(1u))) >> 20;
  U code = bits_as<U>(if_less(size, set(0x1p-6f), bits_as<F>(subnormal), bits_as<F>(normal)));
  store_bytes(&p->bits, code | sign, n);
}

// ---- across lanes ----

// fold: sums or maxima of lanes until four are left
KV_INLINE V4 fold(V4 x) { return x; }
KV_INLINE V4 fold_max(V4 x) { return x; }
#if defined(KV_AVX512) || defined(KV_AVX2)
KV_INLINE V4 low(V8 x) { return (V4)_mm256_castps256_ps128((__m256)x); }
KV_INLINE V4 high(V8 x) { return (V4)_mm256_extractf128_ps((__m256)x, 1); }
KV_INLINE V4 fold(V8 x) { return low(x) + high(x); }
KV_INLINE V4 fold_max(V8 x) { return max(low(x), high(x)); }
#endif
#if defined(KV_AVX512)
KV_INLINE V8 low(V16 x) { return (V8)_mm512_castps512_ps256((__m512)x); }
KV_INLINE V8 high(V16 x) { return (V8)_mm512_extractf32x8_ps((__m512)x, 1); }
KV_INLINE V4 fold(V16 x) { return fold(low(x) + high(x)); }
KV_INLINE V4 fold_max(V16 x) { return fold_max(max(low(x), high(x))); }
#endif
template <class H> KV_INLINE V4 fold(Pair<H> x) { return fold(x.lo + x.hi); }
template <class H> KV_INLINE V4 fold_max(Pair<H> x) { return fold_max(max(x.lo, x.hi)); }

KV_INLINE float sum(F x) { V4 f = fold(x); return (f[0] + f[2]) + (f[1] + f[3]); }
KV_INLINE float largest(F x) {
  V4 f = fold_max(x);
  float a = f[0] > f[1] ? f[0] : f[1], b = f[2] > f[3] ? f[2] : f[3];
  return a > b ? a : b;
}

KV_INLINE float smallest(F x) { return -largest(x * set(-1.0f)); }

// interleaved(a, b) = {a0 + a1, a2 + a3, b0 + b1, b2 + b3}, in every four lanes
KV_INLINE V4 interleaved(V4 a, V4 b) {
#if defined(KV_NEON)
  return (V4)vpaddq_f32((float32x4_t)a, (float32x4_t)b);
#elif defined(__SSE__)
  return (V4)_mm_shuffle_ps((__m128)a, (__m128)b, 0x88) + (V4)_mm_shuffle_ps((__m128)a, (__m128)b, 0xdd);
#else
  return V4{a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
#endif
}
// The sums of four: {sum(a), sum(b), sum(c), sum(d)}.
KV_INLINE V4 sum4(F a, F b, F c, F d) {
  return interleaved(interleaved(fold(a), fold(b)), interleaved(fold(c), fold(d)));
}

// quad(a, b, c, d): the sums of four, folded until each has four lanes, one block of the result.
#if defined(KV_AVX512)
KV_INLINE V16 blocks(V16 a, V16 b) {  // interleaved(a, b) for blocks of four lanes
  __m512 x = (__m512)a, y = (__m512)b;
  return (V16)_mm512_shuffle_f32x4(x, y, 0x88) + (V16)_mm512_shuffle_f32x4(x, y, 0xdd);
}
KV_INLINE V16 interleaved(V16 a, V16 b) {
  return (V16)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88) + (V16)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xdd);
}
KV_INLINE F quad(F a, F b, F c, F d) { return blocks(blocks(a, b), blocks(c, d)); }
#elif defined(KV_AVX2)
KV_INLINE V8 blocks(F a, F b) {
  __m256 x = (__m256)(a.lo + a.hi), y = (__m256)(b.lo + b.hi);
  return (V8)_mm256_permute2f128_ps(x, y, 0x20) + (V8)_mm256_permute2f128_ps(x, y, 0x31);
}
KV_INLINE V8 interleaved(V8 a, V8 b) {
  return (V8)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88) + (V8)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd);
}
KV_INLINE F quad(F a, F b, F c, F d) { return {blocks(a, b), blocks(c, d)}; }
#else
KV_INLINE F quad(F a, F b, F c, F d) { return {{fold(a), fold(b)}, {fold(c), fold(d)}}; }
#endif
template <class H> KV_INLINE Pair<H> interleaved(Pair<H> a, Pair<H> b) {
  return {interleaved(a.lo, b.lo), interleaved(a.hi, b.hi)};
}

// The sums of sixteen, lane i that of x[i], from quad(x[0], x[4], x[8], x[12]), quad(x[1], x[5], x[9], x[13]), ...:
// a transposing tree, 3 instructions a sum instead of 8.
KV_INLINE F sum16(F a, F b, F c, F d) { return interleaved(interleaved(a, b), interleaved(c, d)); }

// ---- functions ----

// 2^x for x <= 0, to 2.5 ulp; 0 below -126 (a masked logit of -1e30 weighs nothing). x = n + f, |f| <= 1/2:
// 1.5 * 2^23 + x has n in its low bits, and 2^f is a minimax polynomial of relative error 9e-8. NaN stays NaN.
KV_INLINE F exp2_negative(F x) {
  const float shift = 12582912.0f;
  x = max(set(-127.0f), x);  // in this order: of what cannot be compared it is the second
  F shifted = x + set(shift);
  F f = x - (shifted - set(shift));
  F p = mul_add(f, set(1.326472717e-3f), set(9.671512642e-3f));
  p = mul_add(p, f, set(5.550733743e-2f));
  p = mul_add(p, f, set(2.402224209e-1f));
  p = mul_add(p, f, set(6.931469776e-1f));
  p = mul_add(p, f, set(1.0f));
  return p * bits_as<F>((bits_as<U>(shifted) + unsigned_all(127u)) << 23);
}

// tanh(x): x + x^3 P(x^2) up to 0.625, 1 - 2 e / (1 + e) with e = exp(-2 |x|) above.
KV_INLINE F tanh(F x) {
  F size = max(x, zero() - x), z = x * x;
  F p = mul_add(z, set(-5.717045219e-3f), set(2.065058748e-2f));
  p = mul_add(p, z, set(-5.374349815e-2f));
  p = mul_add(p, z, set(1.333149129e-1f));
  p = mul_add(p, z, set(-3.333328393e-1f));
  F near = mul_add(p * z, x, x);
  F e = exp2_negative(size * set(-2.885390082f));
  F far = set(1.0f) - (e + e) / (set(1.0f) + e);
  return if_less(size, set(0.625f), near, if_less(x, zero(), zero() - far, far));
}
