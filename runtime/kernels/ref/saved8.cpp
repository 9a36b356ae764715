// pack8(x f32[N, ...]) = u8[N, scales and codes]
//   s = max |x| / 127 in each block of 128 elements of a row; code = round(x / s) + 128, and 128 where s is 0
// unpack8(packed; shape) = (code - 128) * s
//
// A row of the packed tensor: the f32 scales of its blocks, then its codes, filled up with zeros to a word.
#include "saved8.h"

#include <algorithm>

#include "quantized.h"

namespace pockc::ref {
namespace {

bool is_packed(const Tensor& packed, const Tensor& x) {
  if (x.dtype != DType::kF32 || x.rank < 2 || packed.dtype != DType::kU8) return false;
  return has_shape(packed, {x.dims[0], packed_bytes(x.elements() / x.dims[0])});
}

}  // namespace

Status check_pack8(const Call& call) {
  if (!has_operands(call, 1, 1, 1) || !no_attributes(call)) return PK_BAD_FILE;
  return verdict(is_packed(call.outputs[0], call.inputs[0]));
}

Status run_pack8(const Call& call) {
  const Tensor& x = call.inputs[0];
  const int64_t columns = x.elements() / x.dims[0], bytes = packed_bytes(columns);
  const int64_t scales = kScaleBytes * saved_blocks(columns);
  for (int64_t row = 0; row < x.dims[0]; ++row) {
    const float* from = x.as<float>() + row * columns;
    uint8_t* to = call.outputs[0].as<uint8_t>() + row * bytes;
    for (int64_t i = scales + columns; i < bytes; ++i) to[i] = 0;
    for (int64_t begin = 0; begin < columns; begin += kSavedBlock) {
      const int64_t end = std::min(columns, begin + kSavedBlock);
      float most = 0.0f;
      for (int64_t i = begin; i < end; ++i) most = std::fabs(from[i]) > most ? std::fabs(from[i]) : most;
      const float scale = most / kLargestSaved;
      std::memcpy(to + kScaleBytes * (begin / kSavedBlock), &scale, sizeof(scale));
      for (int64_t i = begin; i < end; ++i) {
        const float step = scale == 0.0f ? 0.0f : from[i] / scale;
        to[scales + i] = to_code(step + kSavedZero, {0.0f, static_cast<float>(kLargestCode)});
      }
    }
  }
  return PK_OK;
}

Status check_unpack8(const Call& call) {
  if (!has_operands(call, 1, 1, 1)) return PK_BAD_FILE;
  const Tensor& x = call.outputs[0];
  Attributes attributes(call);
  const Tuple shape = attributes.tuple(1, kMaxElements);
  return verdict(attributes.valid() && has_shape(x, shape) && is_packed(call.inputs[0], x));
}

Status run_unpack8(const Call& call) {
  const Tensor& x = call.outputs[0];
  const int64_t columns = x.elements() / x.dims[0], bytes = packed_bytes(columns);
  const int64_t scales = kScaleBytes * saved_blocks(columns);
  for (int64_t row = 0; row < x.dims[0]; ++row) {
    const uint8_t* from = call.inputs[0].as<uint8_t>() + row * bytes;
    float* to = x.as<float>() + row * columns;
    for (int64_t i = 0; i < columns; ++i) {
      float scale;
      std::memcpy(&scale, from + kScaleBytes * (i / kSavedBlock), sizeof(scale));
      to[i] = (static_cast<float>(from[scales + i]) - kSavedZero) * scale;
    }
  }
  return PK_OK;
}

}  // namespace pockc::ref
