// quantize(x f32; scale, zero_point) = code(x / scale + zero_point)
// dequantize(x u8; scale, zero_point) = (x - zero_point) * scale
// lookup_int8(x u8, table u8[256]) = table[x]
// add_int8(a, b u8; a_factor, a_zero_point, b_factor, b_zero_point, zero_point, low, high)
//   = code((a - a_zero_point) * a_factor + (b - b_zero_point) * b_factor + zero_point)
// The outputs of the last two may be an operand that they read element by element.
#include "quantized.h"

namespace pockc::ref {
namespace {

constexpr Bounds kAllCodes = {0.0f, static_cast<float>(kLargestCode)};

struct Scale {
  float scale = 0.0f, zero = 0.0f;
  float number(uint8_t code) const { return (static_cast<float>(code) - zero) * scale; }
};

Scale read_scale(Attributes& attributes) {
  Scale read;
  read.scale = attributes.number_f32();
  read.zero = static_cast<float>(attributes.integer(0, kLargestCode));
  return read;
}

// One operand, and a result of the same shape.
Status check_conversion(const Call& call, DType from, DType to) {
  if (!has_operands(call, 1, 1, 1)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &y = call.outputs[0];
  Attributes attributes(call);
  const Scale scale = read_scale(attributes);
  return verdict(attributes.valid() && scale.scale > 0.0f && x.dtype == from && y.dtype == to &&
                 same_shape(x, y));
}

struct Addition {
  Scale a, b;
  float zero = 0.0f;
  Bounds bounds;
};

Addition read_addition(Attributes& attributes) {
  Addition read;
  read.a = read_scale(attributes);
  read.b = read_scale(attributes);
  read.zero = static_cast<float>(attributes.integer(0, kLargestCode));
  read.bounds = read_bounds(attributes);
  return read;
}

}  // namespace

Status check_quantize(const Call& call) { return check_conversion(call, DType::kF32, DType::kU8); }

Status run_quantize(const Call& call) {
  Attributes attributes(call);
  const Scale scale = read_scale(attributes);
  const float* x = call.inputs[0].as<float>();
  uint8_t* y = call.outputs[0].as<uint8_t>();
  const int64_t count = call.outputs[0].elements();
  for (int64_t i = 0; i < count; ++i) y[i] = to_code(x[i] / scale.scale + scale.zero, kAllCodes);
  return PK_OK;
}

Status check_dequantize(const Call& call) { return check_conversion(call, DType::kU8, DType::kF32); }

Status run_dequantize(const Call& call) {
  Attributes attributes(call);
  const Scale scale = read_scale(attributes);
  const uint8_t* x = call.inputs[0].as<uint8_t>();
  float* y = call.outputs[0].as<float>();
  const int64_t count = call.outputs[0].elements();
  for (int64_t i = 0; i < count; ++i) y[i] = scale.number(x[i]);
  return PK_OK;
}

Status check_lookup_int8(const Call& call) {
  if (!has_operands(call, 2, 2, 1) || !no_attributes(call)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &table = call.inputs[1];
  return verdict(is_codes(x) && same_type(x, call.outputs[0]) && is_codes(table) &&
                 has_shape(table, {kLargestCode + 1}));
}

Status run_lookup_int8(const Call& call) {
  const uint8_t* x = call.inputs[0].as<uint8_t>();
  const uint8_t* table = call.inputs[1].as<uint8_t>();
  uint8_t* y = call.outputs[0].as<uint8_t>();
  const int64_t count = call.outputs[0].elements();
  for (int64_t i = 0; i < count; ++i) y[i] = table[x[i]];
  return PK_OK;
}

Status check_add_int8(const Call& call) {
  if (!has_operands(call, 2, 2, 1)) return PK_BAD_FILE;
  const Tensor& y = call.outputs[0];
  Attributes attributes(call);
  const Addition addition = read_addition(attributes);
  return verdict(attributes.valid() && addition.bounds.valid() && is_codes(y) &&
                 same_type(call.inputs[0], y) && same_type(call.inputs[1], y));
}

Status run_add_int8(const Call& call) {
  Attributes attributes(call);
  const Addition add = read_addition(attributes);
  const uint8_t* a = call.inputs[0].as<uint8_t>();
  const uint8_t* b = call.inputs[1].as<uint8_t>();
  uint8_t* y = call.outputs[0].as<uint8_t>();
  const int64_t count = call.outputs[0].elements();
  for (int64_t i = 0; i < count; ++i) {
    y[i] = to_code(add.a.number(a[i]) + add.b.number(b[i]) + add.zero, add.bounds);
  }
  return PK_OK;
}

}  // namespace pockc::ref
