// Tensors of one byte per element (see ref/quantized.h) in native vectors: a vector of W integers for W
// codes.
//
// Sums of products are exact, so their order is free; what is rounded is written as in the reference kernels,
// operation by operation, without fma.
#ifndef POCKC_SIMD_CODES_H_
#define POCKC_SIMD_CODES_H_

#include "simd/attributes.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

typedef uint8_t vb __attribute__((vector_size(W)));

constexpr int32_t kWeightZero = 128;  // the code of a weight of 0

// n <= W codes as integers; 0 in the other lanes.
POCKC_INLINE vi widen(const uint8_t* p, int64_t n) {
#if defined(__AVX512F__)
  // The unmasked forms trip -Wmaybe-uninitialized in GCC 12.
  const __m128i codes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p);
  return reinterpret_cast<vi>(_mm512_maskz_cvtepu8_epi32(0xffff, codes));
#else
  uint8_t bytes[W] = {};
  if (n < W) {
    for (int64_t i = 0; i < n; ++i) bytes[i] = p[i];
    p = bytes;
  }
#if defined(__AVX2__)
  return reinterpret_cast<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vb codes;
  __builtin_memcpy(&codes, p, W);
  return __builtin_convertvector(codes, vi);
#endif
#endif
}

// The first n <= W integers, which are codes.
POCKC_INLINE void narrow(uint8_t* p, vi x, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_cvtepi32_storeu_epi8(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512i>(x));
#else
  const vb bytes = __builtin_convertvector(x, vb);
  uint8_t all[W];
  __builtin_memcpy(all, &bytes, W);
  if (n == W) {
    __builtin_memcpy(p, all, W);
  } else {
    for (int64_t i = 0; i < n; ++i) p[i] = all[i];
  }
#endif
}

// Each lane holds two numbers of 16 bits, with signs: the sum of the two products.
POCKC_INLINE vi pair_products(vi a, vi b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<vi>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#elif defined(__aarch64__)
  const int16x8_t x = reinterpret_cast<int16x8_t>(a), y = reinterpret_cast<int16x8_t>(b);
  const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
  return reinterpret_cast<vi>(vpaddq_s32(low, high));
#else
  const vi low_a = reinterpret_cast<vi>(reinterpret_cast<vu>(a) << 16) >> 16;
  const vi low_b = reinterpret_cast<vi>(reinterpret_cast<vu>(b) << 16) >> 16;
  return low_a * low_b + (a >> 16) * (b >> 16);
#endif
}

// Each lane holds one number of 16 bits, in `b` without a sign: their products.
POCKC_INLINE vi products(vi a, vi b) {
#if defined(__x86_64__)
  return pair_products(a, b);  // the upper halves of b are 0; there are no, or only slow, products of 32 bits
#else
  return a * b;
#endif
}

POCKC_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// The nearest codes between two bounds that are codes; `low` for what is no number.
POCKC_INLINE vi to_codes(vf x, vf low, vf high) {
#if defined(__aarch64__)
  return reinterpret_cast<vi>(vcvtnq_s32_f32(vminnmq_f32(vmaxnmq_f32(x, low), high)));
#else
  x = select(x > low, x, low);
  x = select(x < high, x, high);
  // 1.5 * 2^23: a float of that size has no room for fractions, and the sum rounds them to the nearest even.
  const vf shift = splat(12582912.0f);
  return __builtin_convertvector((x + shift) - shift, vi);
#endif
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_CODES_H_
