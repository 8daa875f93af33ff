// Sixteen floats at a time: `F`, one AVX-512 register, two of AVX, or four of NEON, SSE or plain vector code.
//
// A kernel is written once against F. `V16`, `V8` and `V4` are what the CPU has; `Pair` makes sixteen of what is
// narrower. Results agree between CPUs to rounding. Lanes past the end of a row are never read: give `load` a count.
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#define KV_NEON
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define KV_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KV_AVX2
#endif
#define KV_INLINE static inline __attribute__((always_inline))

// ---- element types, as bits in memory ----

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };  // the finite kind (e4m3fn): no infinities, 0x7f and 0xff are NaN

// ---- what the CPU has ----

typedef float V4 __attribute__((vector_size(16)));
typedef float V8 __attribute__((vector_size(32)));
typedef float V16 __attribute__((vector_size(64)));
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef uint32_t U16 __attribute__((vector_size(64)));

template <class H> struct Pair { H lo, hi; };
template <class V> struct As {};  // names the result of an overload

#define KV_PAIRWISE(op)                                                                                        \
  template <class H> KV_INLINE Pair<H> operator op(Pair<H> a, Pair<H> b) { return {a.lo op b.lo, a.hi op b.hi}; }
KV_PAIRWISE(+) KV_PAIRWISE(-) KV_PAIRWISE(*) KV_PAIRWISE(/) KV_PAIRWISE(&) KV_PAIRWISE(|)
#undef KV_PAIRWISE

#if defined(KV_AVX512)
typedef V16 F;
typedef U16 U;
#elif defined(KV_AVX2)
typedef Pair<V8> F;
typedef Pair<U8> U;
#else
typedef Pair<Pair<V4>> F;
typedef Pair<Pair<U4>> U;
#endif

// every V?: all lanes, load, store, fma, larger, smaller, a < b ? x : y; from whole numbers, and bits as they are
KV_INLINE V4 all(As<V4>, float x) { return V4{x, x, x, x}; }
KV_INLINE U4 all(As<U4>, uint32_t x) { return U4{x, x, x, x}; }
KV_INLINE U4 bits(V4 x) { return (U4)x; }
KV_INLINE V4 floats(U4 x) { return (V4)x; }
template <int N> KV_INLINE U4 left(U4 x) { return x << N; }
template <int N> KV_INLINE U4 right(U4 x) { return x >> N; }
template <class T> KV_INLINE T memory(const void* p) { T x; memcpy(&x, p, sizeof x); return x; }
KV_INLINE V4 load(As<V4>, const float* p) { return memory<V4>(p); }
KV_INLINE void put(float* p, V4 x) { memcpy(p, &x, sizeof x); }
KV_INLINE U4 whole(As<U4>, const uint8_t* p) { return U4{p[0], p[1], p[2], p[3]}; }
KV_INLINE U4 whole(As<U4>, const uint16_t* p) { return U4{p[0], p[1], p[2], p[3]}; }
KV_INLINE V4 unsigned_to_float(U4 x) { return V4{(float)x[0], (float)x[1], (float)x[2], (float)x[3]}; }
