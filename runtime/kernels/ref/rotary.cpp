// rotary(x[B,H,T,D], cos, sin; inverse), cos and sin broadcast to x; halves [x1, x2] of the last axis, D
// even:
//   forward  y1 = x1 * cos1 - x2 * sin1,  y2 = x2 * cos2 + x1 * sin2      (x * cos + rotate_half(x) * sin)
//   inverse  y1 = x1 * cos1 + x2 * sin2,  y2 = x2 * cos2 - x1 * sin1      (x * cos - rotate_half(x * sin)),
//   the transpose
#include "common.h"

namespace pockc::ref {

Status check_rotary(const Call& call) {
  if (!has_operands(call, 3, 3, 1) || !all_f32(call)) return PK_BAD_FILE;
  const Tensor& x = call.inputs[0];
  Attributes attributes(call);
  attributes.boolean();
  return verdict(attributes.valid() && x.rank == 4 && last_dim(x) % 2 == 0 &&
                 same_shape(x, call.outputs[0]) && broadcasts_to(call.inputs[1], x) &&
                 broadcasts_to(call.inputs[2], x));
}

Status run_rotary(const Call& call) {
  const bool inverse = Attributes(call).boolean();
  const Tensor& x = call.inputs[0];
  int64_t cos_strides[kMaxRank] = {}, sin_strides[kMaxRank] = {};
  broadcast_strides(call.inputs[1], x, cos_strides);
  broadcast_strides(call.inputs[2], x, sin_strides);
  const int64_t depth = last_dim(x), half = depth / 2, rows = x.elements() / depth;
  const int64_t cos_step = cos_strides[3], sin_step = sin_strides[3];
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t index[3] = {row / (x.dims[1] * x.dims[2]), row / x.dims[2] % x.dims[1], row % x.dims[2]};
    const float* cos = call.inputs[1].as<float>();
    const float* sin = call.inputs[2].as<float>();
    for (int axis = 0; axis < 3; ++axis) {
      cos += index[axis] * cos_strides[axis];
      sin += index[axis] * sin_strides[axis];
    }
    const float* in = x.as<float>() + row * depth;
    float* out = call.outputs[0].as<float>() + row * depth;
    for (int64_t i = 0; i < half; ++i) {
      const float x1 = in[i], x2 = in[i + half];
      const float sin1 = sin[i * sin_step], sin2 = sin[(i + half) * sin_step];
      out[i] = x1 * cos[i * cos_step] + (inverse ? x2 * sin2 : -x2 * sin1);
      out[i + half] = x2 * cos[(i + half) * cos_step] + (inverse ? -x1 * sin1 : x1 * sin2);
    }
  }
  return PK_OK;
}

}  // namespace pockc::ref
