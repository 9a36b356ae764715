// What every vectorised kernel is written in: one native vector of floats, `vf`, of W lanes.
//
// The same sources are compiled once per instruction set. Results are the same bits on every set with fused
// multiply-add because (1) a sum over k is one chain of `fma` per output element, whatever the vector width,
// (2) a sum along memory always uses 16 lanes (struct Lanes: one to four native vectors) and the same tree to
// join them, (3) products and sums that matter are written with `fma`, and the build turns contraction off.
//
// Nothing here or in the kernels may be an inline function with external linkage outside of this namespace
// (std::min, Tensor::elements): the linker keeps one copy of such a function, perhaps the one with AVX-512
// instructions.
#ifndef POCKC_SIMD_SIMD_H_
#define POCKC_SIMD_SIMD_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "pockc/kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) || defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// A 32-bit ARM build is for CPUs with NEON and fused multiply-add (VFPv4): without, its results would differ.
#if defined(__arm__) && !(defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA))
#error "32-bit ARM needs -mfpu=neon-vfpv4 (or a CPU that has it, such as -mcpu=cortex-a7)"
#endif

#define POCKC_INLINE inline __attribute__((always_inline))
// On the inner lambdas: a call that is not inlined would test `valid` at every load.
#define POCKC_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define POCKC_UNROLL _Pragma("unroll 32")
#else
#define POCKC_UNROLL _Pragma("GCC unroll 32")
#endif

// Whether __builtin_fmaf is one instruction here: a call of the C library's would be slow.
#if defined(__FMA__) || defined(__aarch64__) || defined(__arm__) || defined(__riscv_flen)
#define POCKC_HAS_FMA 1
#endif

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef float vf_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));

template <typename T>
POCKC_INLINE T minimum(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
POCKC_INLINE T maximum(T a, T b) {
  return a < b ? b : a;
}
POCKC_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
POCKC_INLINE int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

POCKC_INLINE vf splat(float x) { return x - vf{}; }
POCKC_INLINE vi splat_int(int32_t x) { return x - vi{}; }
POCKC_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
POCKC_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
POCKC_INLINE vi bits_of(vf x) { return reinterpret_cast<vi>(x); }
POCKC_INLINE vf float_of_bits(vi x) { return reinterpret_cast<vf>(x); }
POCKC_INLINE vf absolute(vf x) { return float_of_bits(bits_of(x) & splat_int(0x7fffffff)); }
POCKC_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }

// a * b + c, rounded once where the hardware can.
POCKC_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__) || defined(__ARM_NEON)
  return vfmaq_f32(c, a, b);
#elif defined(POCKC_HAS_FMA)
  vf sum;
  for (int i = 0; i < W; ++i) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return sum;
#else
  return a * b + c;
#endif
}
POCKC_INLINE float fma(float a, float b, float c) {
#if defined(POCKC_HAS_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

POCKC_INLINE vf square_root(vf x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);  // the unmasked form trips -Wmaybe-uninitialized in GCC 12
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__x86_64__)
  return _mm_sqrt_ps(x);
#elif defined(__aarch64__)
  return vsqrtq_f32(x);
#else
  vf y;
  for (int i = 0; i < W; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}

// All ones in the first n lanes.
POCKC_INLINE vi first_lanes(int64_t n) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane < splat_int(static_cast<int32_t>(n));
}

// The first n < W lanes; the others are zero.
POCKC_INLINE vf load_partial(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(first_lanes(n)));
#else
  vf x = {};
  for (int64_t i = 0; i < n; ++i) x[i] = p[i];
  return x;
#endif
}
POCKC_INLINE void store_partial(float* p, vf x, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(first_lanes(n)), x);
#else
  for (int64_t i = 0; i < n; ++i) p[i] = x[i];
#endif
}

// NaN stays NaN, as in the reference kernels.
POCKC_INLINE vf clip(vf x, vf low, vf high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}
// Like the hardware's maximum: b where a is NaN.
POCKC_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

// Calls f(offset, valid) for consecutive vectors of [begin, end); valid == W but for the last.
template <typename F>
POCKC_INLINE void for_vectors(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + W <= end; i += W) f(i, static_cast<int64_t>(W));
  if (i < end) f(i, end - i);
}
POCKC_INLINE vf load_n(const float* p, int64_t n) { return n == W ? load(p) : load_partial(p, n); }
POCKC_INLINE void store_n(float* p, vf x, int64_t n) {
  if (n == W) {
    store(p, x);
  } else {
    store_partial(p, x, n);
  }
}

// x with the lanes from `valid` on replaced.
POCKC_INLINE vf keep_first(vf x, int64_t valid, vf rest) { return select(first_lanes(valid), x, rest); }

// Sixteen partial sums, whatever the vector width.
constexpr int kLanes = 16;
struct Lanes {
  vf v[kLanes / W];

  static POCKC_INLINE Lanes all(float x) {
    Lanes lanes;
    for (int i = 0; i < kLanes / W; ++i) lanes.v[i] = splat(x);
    return lanes;
  }
  // 8 + 8, 4 + 4, 2 + 2, 1 + 1: lane i joins lane i + half.
  POCKC_INLINE float sum() const {
    float x[kLanes];
    for (int i = 0; i < kLanes / W; ++i) store(x + i * W, v[i]);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) x[i] += x[i + half];
    }
    return x[0];
  }
  POCKC_INLINE float max() const {
    float x[kLanes];
    for (int i = 0; i < kLanes / W; ++i) store(x + i * W, v[i]);
    float most = x[0];
    for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
    return most;
  }
};

// Calls f(vector of the sixteen, offset, valid lanes of it) along [0, n): element i always belongs to lane i
// % 16.
template <typename F>
POCKC_INLINE void for_lanes(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes / W; ++j) f(j, i + j * W, static_cast<int64_t>(W));
  }
  for (int j = 0; j < kLanes / W && i < n; ++j, i += W) f(j, i, minimum<int64_t>(n - i, W));
}

// --- calls ---

POCKC_INLINE int64_t elements(const Tensor& t) {
  int64_t n = 1;
  for (int i = 0; i < t.rank; ++i) n *= t.dims[i];
  return n;
}
POCKC_INLINE bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.rank != b.rank) return false;
  for (int i = 0; i < a.rank; ++i) {
    if (a.dims[i] != b.dims[i]) return false;
  }
  return true;
}
POCKC_INLINE bool is_f32(const Tensor& t) { return t.dtype == DType::kF32; }
POCKC_INLINE int64_t last_dim(const Tensor& t) { return t.rank == 0 ? 1 : t.dims[t.rank - 1]; }
POCKC_INLINE int thread_count(const Call& call) { return call.pool == nullptr ? 1 : call.pool->threads(); }

// f(begin, end, thread), like ThreadPool::parallel_for, but its plumbing has internal linkage (see above).
// What f holds by value stays in registers, for it is copied first: a float that is written could be part of
// anything that has an address.
template <typename F>
void parallel(const Call& call, int64_t count, int64_t grain, F&& f) {
  if (call.pool == nullptr || count <= grain) {
    const auto own = f;
    if (count > 0) own(static_cast<int64_t>(0), count, 0);
    return;
  }
  struct Thunk {
    static void run(void* context, int64_t begin, int64_t end, int thread) {
      const auto own = *static_cast<typename std::remove_reference<F>::type*>(context);
      own(begin, end, thread);
    }
  };
  call.pool->parallel_for(count, grain, &Thunk::run, &f);
}
// How many elements make it worth waking another thread.
constexpr int64_t kElementGrain = 16384;

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_SIMD_H_
