// Bit masks: bit i % 8 of byte i / 8 stands for element i; bits past the last element are zero.
//   range_mask(x; low, high, inclusive) -> 1 where low < x < high (or <=); an infinite bound always holds
//   apply_mask(x, mask; scale)          -> x * scale where the bit is set, else 0; the output may be x itself
#include <cmath>

#include "common.h"

namespace pockc::ref {
namespace {

bool is_mask_of(const Tensor& mask, const Tensor& x) {
  return mask.dtype == DType::kU8 && has_shape(mask, {(x.elements() + 7) / 8});
}

}  // namespace

Status check_range_mask(const Call& call) {
  if (!has_operands(call, 1, 1, 1)) return PK_BAD_FILE;
  Attributes attributes(call);
  attributes.number();
  attributes.number();
  attributes.boolean();
  return verdict(attributes.valid() && is_f32(call.inputs[0]) && is_mask_of(call.outputs[0], call.inputs[0]));
}

Status run_range_mask(const Call& call) {
  Attributes attributes(call);
  const float low = attributes.number_f32();
  const float high = attributes.number_f32();
  const bool inclusive = attributes.boolean();
  const bool no_low = std::isinf(low) && low < 0.0f, no_high = std::isinf(high) && high > 0.0f;
  const float* x = call.inputs[0].as<float>();
  uint8_t* mask = call.outputs[0].as<uint8_t>();
  const int64_t elements = call.inputs[0].elements();
  fill_zero(call.outputs[0]);
  for (int64_t i = 0; i < elements; ++i) {
    const bool above = no_low || (inclusive ? x[i] >= low : x[i] > low);
    const bool below = no_high || (inclusive ? x[i] <= high : x[i] < high);
    if (above && below) mask[i / 8] = static_cast<uint8_t>(mask[i / 8] | 1u << (i % 8));
  }
  return PK_OK;
}

Status check_apply_mask(const Call& call) {
  if (!has_operands(call, 2, 2, 1)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &mask = call.inputs[1];
  Attributes attributes(call);
  attributes.number();
  return verdict(attributes.valid() && is_f32(x) && same_type(x, call.outputs[0]) && is_mask_of(mask, x));
}

Status run_apply_mask(const Call& call) {
  const float scale = Attributes(call).number_f32();
  const float* x = call.inputs[0].as<float>();
  const uint8_t* mask = call.inputs[1].as<uint8_t>();
  float* out = call.outputs[0].as<float>();
  const int64_t elements = call.outputs[0].elements();
  for (int64_t i = 0; i < elements; ++i) out[i] = (mask[i / 8] >> (i % 8) & 1) != 0 ? x[i] * scale : 0.0f;
  return PK_OK;
}

}  // namespace pockc::ref
