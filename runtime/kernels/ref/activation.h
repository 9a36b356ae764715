// Activation functions of one element, used alone (unary.cpp) and as the epilogue of matmul and conv2d.
#ifndef POCKC_KERNELS_REF_ACTIVATION_H_
#define POCKC_KERNELS_REF_ACTIVATION_H_

#include <cmath>

#include "common.h"

namespace pockc::ref {

constexpr float kInverseSqrt2 = 0.70710678118654752f;
constexpr float kSqrt2OverPi = 0.79788456080286536f;
constexpr float kGeluCubic = 0.044715f;

// NaN compares false and passes through.
inline float clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
inline float silu(float x) { return x * sigmoid(x); }
inline float hardsigmoid(float x) { return clip(x + 3.0f, 0.0f, 6.0f) / 6.0f; }
inline float hardswish(float x) { return x * clip(x + 3.0f, 0.0f, 6.0f) / 6.0f; }
inline float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * kInverseSqrt2)); }
inline float gelu_tanh(float x) {
  return 0.5f * x * (1.0f + std::tanh(kSqrt2OverPi * (x + kGeluCubic * x * x * x)));
}

// The fused epilogue of matmul and conv2d: attributes activation, low, high; low and high belong to "clip".
struct Epilogue {
  int64_t activation = kNone;
  float low = 0.0f;
  float high = 0.0f;

  float operator()(float x) const {
    switch (activation) {
      case kClip:
        return clip(x, low, high);
      case kGelu:
        return gelu(x);
      case kGeluTanh:
        return gelu_tanh(x);
      case kSilu:
        return silu(x);
      case kHardswish:
        return hardswish(x);
      default:
        return x;
    }
  }
};

inline Epilogue read_epilogue(Attributes& attributes) {
  Epilogue epilogue;
  epilogue.activation = attributes.integer(kNone, kHardswish);
  epilogue.low = attributes.number_f32();
  epilogue.high = attributes.number_f32();
  return epilogue;
}

// Adds the bias (may be null) and applies the activation to one contiguous row of outputs.
inline void finish_row(const Epilogue& epilogue, const float* bias, float* row, int64_t count) {
  if (bias != nullptr) add_scaled(1.0f, bias, row, count);
  if (epilogue.activation == kNone) return;
  for (int64_t i = 0; i < count; ++i) row[i] = epilogue(row[i]);
}

}  // namespace pockc::ref

#endif  // POCKC_KERNELS_REF_ACTIVATION_H_
