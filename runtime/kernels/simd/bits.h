// Sixteen mask bits at a time: bit i of a mask is bit i % 8 of byte i / 8.
#ifndef POCKC_SIMD_BITS_H_
#define POCKC_SIMD_BITS_H_

#include "simd/simd.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

// One bit per lane that is all ones.
POCKC_INLINE uint32_t bits_of_lanes(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#elif defined(__aarch64__)
  return vaddvq_u32(reinterpret_cast<vu>(mask) & vu{1, 2, 4, 8});
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// The lanes whose bit is set, from bit `first` on, all ones.
POCKC_INLINE vi lanes_of_bits(uint32_t bits, int64_t first = 0) {
  vi bit;
  for (int i = 0; i < W; ++i) bit[i] = 1 << (first + i);
  return (splat_int(static_cast<int32_t>(bits)) & bit) != splat_int(0);
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_BITS_H_
