// Optimizer slots of one byte per element: codes u8 in the shape of the gradient, and one f32 scale for each
// 256 codes in the order of storage. The scale s is the largest size in the block, and both laws are squares:
//   momenta         m = s c |c| / 127^2,            c = -127 .. 127 (two's complement)
//   second moments  sqrt(v) = s c^2 / 255^2,        c = 0 .. 255
// A square law spends its levels where a linear one has none left: half a step at the share x of the largest
// is 1 / (127 sqrt(x)) of the value, and the smallest level is 6e-5 (of sqrt(v) 1.5e-5) of the largest. Codes
// round to nearest, but a positive v never becomes 0: m / sqrt(v) would explode.
#ifndef POCKC_KERNELS_REF_OPTIMIZER8_H_
#define POCKC_KERNELS_REF_OPTIMIZER8_H_

#include <cmath>

#include "optimizer.h"

namespace pockc::ref {

constexpr int64_t kBlock = 256;

// `slots` pairs of codes and scales after p and g, then scalars and indices as everywhere.
inline bool fits_update8(const Call& call, int slots, int scalars, const Part& part) {
  const Tensor& p = call.inputs[0];
  const Tensor& g = call.inputs[1];
  if (!is_f32(p) || !is_f32(g) || !same_type(p, call.outputs[0])) return false;
  const int64_t blocks = (g.elements() - 1) / kBlock + 1;
  for (int i = 0; i < slots; ++i) {
    const Tensor& codes = call.inputs[2 + 2 * i];
    const Tensor& scale = call.inputs[3 + 2 * i];
    if (codes.dtype != DType::kU8 || !same_shape(codes, g)) return false;
    if (!is_f32(scale) || !has_shape(scale, {blocks})) return false;
    if (!same_type(codes, call.outputs[1 + 2 * i]) || !same_type(scale, call.outputs[2 + 2 * i]))
      return false;
  }
  return fits_rest(call, 2 + 2 * slots, scalars, part);
}

struct SignedLaw {
  static constexpr float kMost = 127.0f;
  static float size(float value) { return std::fabs(value); }
  static float value(uint8_t code, float scale) {
    const float c = static_cast<int8_t>(code);
    return scale * (c * std::fabs(c) / (kMost * kMost));
  }
  static uint8_t code(float value, int level) { return static_cast<uint8_t>(value < 0.0f ? -level : level); }
};

struct RootLaw {
  static constexpr float kMost = 255.0f;
  static float size(float value) { return std::sqrt(value); }
  static float value(uint8_t code, float scale) {
    const float c = code;
    const float root = scale * (c * c / (kMost * kMost));
    return root * root;
  }
  static uint8_t code(float value, int level) {
    return static_cast<uint8_t>(value > 0.0f && level == 0 ? 1 : level);
  }
};

// One slot of a call, like FloatSlot, walked element by element in the order of storage: `at` before `set` of
// each.
template <typename Law>
class CodedSlot {
 public:
  static constexpr bool kHasStart = false;  // a block may span rows

  CodedSlot(const Call& call, int index)
      : codes_(call.inputs[2 + 2 * index].as<uint8_t>()),
        scale_(call.inputs[3 + 2 * index].as<float>()),
        new_codes_(call.outputs[1 + 2 * index].as<uint8_t>()),
        new_scale_(call.outputs[2 + 2 * index].as<float>()),
        elements_(call.inputs[1].elements()) {}

  float at(int64_t i) const { return Law::value(codes_[i], scale_[i / kBlock]); }

  // The block is written with its last element: until then its old codes are read.
  void set(int64_t i, float value) {
    values_[i % kBlock] = value;
    if (i % kBlock == kBlock - 1 || i == elements_ - 1) write(i / kBlock, i % kBlock + 1);
  }

 private:
  void write(int64_t block, int64_t count) {
    float scale = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      const float size = Law::size(values_[i]);
      scale = size > scale ? size : scale;
    }
    new_scale_[block] = scale;
    for (int64_t i = 0; i < count; ++i) {
      const float share = scale > 0.0f ? Law::size(values_[i]) / scale : 0.0f;
      const float level = Law::kMost * std::sqrt(share);
      const float bounded = level < Law::kMost ? level : Law::kMost;  // NaN becomes the largest
      new_codes_[block * kBlock + i] = Law::code(values_[i], static_cast<int>(bounded + 0.5f));
    }
  }

  const uint8_t* codes_;
  const float* scale_;
  uint8_t* new_codes_;
  float* new_scale_;
  int64_t elements_;
  float values_[kBlock];
};

}  // namespace pockc::ref

#endif  // POCKC_KERNELS_REF_OPTIMIZER8_H_
