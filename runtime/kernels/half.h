// Activations and their gradients in 16 bits: f16 (IEEE 754 binary16: 11 significant bits, up to 65504) and
// b16 (bfloat16, the upper half of a float: 8 significant bits, the range of floats). One element after the
// other.
//
// Every conversion to 16 bits rounds to the nearest, ties to even; what is too large becomes infinite, what
// is below the normal numbers of f16 a subnormal one. Conversions back are exact. So all decoders give the
// same bits.
#ifndef POCKC_KERNELS_HALF_H_
#define POCKC_KERNELS_HALF_H_

#include <cstdint>
#include <cstring>

#include "pockc/kernel.h"

// Without linkage, because these are compiled for several instruction sets: see simd/simd.h.
#define POCKC_HALF_INLINE static inline __attribute__((always_inline))

// A pock-run for one program leaves these kernels out where the program has no such tensor: they are half the
// code.
#ifndef POCKC_HALVES
#define POCKC_HALVES 1
#endif

namespace pockc {

struct F16 {
  uint16_t bits;
};
struct B16 {
  uint16_t bits;
};

POCKC_HALF_INLINE bool is_half(DType dtype) {
  return POCKC_HALVES != 0 && (dtype == DType::kF16 || dtype == DType::kB16);
}

POCKC_HALF_INLINE uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
POCKC_HALF_INLINE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

POCKC_HALF_INLINE float widened(B16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

POCKC_HALF_INLINE float widened(F16 x) {
  constexpr uint32_t kRebias = 112u << 23;  // 127 - 15, in the exponent of a float
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest < 0x400u) {  // zero, or subnormal: that many units of 2^-24
    return float_from_bits(bits_of_float(static_cast<float>(rest) * 0x1p-24f) | sign);
  }
  const uint32_t special = rest >= 0x7c00u ? kRebias : 0u;  // infinities and NaN have the largest exponent
  return float_from_bits(((rest << 13) + kRebias + special) | sign);
}

POCKC_HALF_INLINE void narrow(float x, B16* to) {
  const uint32_t bits = bits_of_float(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding could carry it to infinity
  to->bits = static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

POCKC_HALF_INLINE void narrow(float x, F16* to) {
  const uint32_t bits = bits_of_float(x), size = bits & 0x7fffffffu;
  uint32_t rest;
  if (size > 0x7f800000u) {
    rest = 0x7e00u | (size >> 13 & 0x3ffu);
  } else if (size >= 0x477ff000u) {  // 65520 and above
    rest = 0x7c00u;
  } else if (size >= 0x38800000u) {  // 2^-14, the least normal number
    rest = (size + 0xfffu + (size >> 13 & 1u) - (112u << 23)) >> 13;
  } else {  // the last bit of floats between 1/2 and 1 is 2^-24, the unit of subnormal numbers
    rest = bits_of_float(float_from_bits(size) + 0.5f) - bits_of_float(0.5f);
  }
  to->bits = static_cast<uint16_t>(rest | (bits >> 16 & 0x8000u));
}

}  // namespace pockc

#endif  // POCKC_KERNELS_HALF_H_
