// Eight-bit inference: a code c stands for (c - zero_point) * scale, one scale and zero point per tensor.
//
// Every f32 product, sum and quotient below is rounded by itself, and so are those of the vectorised kernels
// and of the compiler's references: all give the same codes.
#ifndef POCKC_KERNELS_REF_QUANTIZED_H_
#define POCKC_KERNELS_REF_QUANTIZED_H_

#include <cmath>

#include "common.h"

namespace pockc::ref {

constexpr int64_t kLargestCode = 255;
constexpr int32_t kWeightZero = 128;  // the code of a weight of 0

inline bool is_codes(const Tensor& tensor) { return tensor.dtype == DType::kU8; }

struct Bounds {
  float low = 0.0f, high = 0.0f;
  bool valid() const { return low <= high; }
};

inline Bounds read_bounds(Attributes& attributes) {
  Bounds bounds;
  bounds.low = static_cast<float>(attributes.integer(0, kLargestCode));
  bounds.high = static_cast<float>(attributes.integer(0, kLargestCode));
  return bounds;
}

// The nearest code within the bounds, the even one of two that are as near; `low` for what is no number.
inline uint8_t to_code(float x, const Bounds& bounds) {
  x = x > bounds.low ? x : bounds.low;
  x = x < bounds.high ? x : bounds.high;
  return static_cast<uint8_t>(std::nearbyint(x));
}

}  // namespace pockc::ref

#endif  // POCKC_KERNELS_REF_QUANTIZED_H_
