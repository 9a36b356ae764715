// concat(x0, x1, ...; axis)
#include "common.h"

namespace pockc::ref {
namespace {

constexpr int kMostOperands = 64;

}  // namespace

Status check_concat(const Call& call) {
  if (!has_operands(call, 1, kMostOperands, 1, kNoWeight, kHalves)) return PK_BAD_FILE;
  const Tensor& out = call.outputs[0];
  Attributes attributes(call);
  const int axis = attributes.axis(out);
  if (!attributes.valid()) return PK_BAD_FILE;
  int64_t length = 0;
  for (int i = 0; i < call.input_count; ++i) {
    const Tensor& x = call.inputs[i];
    if (x.dtype != out.dtype || !same_shape_except(x, out, axis)) return PK_BAD_FILE;
    length += x.dims[axis];
  }
  return verdict(length == out.dims[axis]);
}

Status run_concat(const Call& call) {
  const Tensor& out = call.outputs[0];
  const int axis = Attributes(call).axis(out);
  const AxisView view = around_axis(out, axis);
  const size_t row_bytes = static_cast<size_t>(view.inner) * element_size(out.dtype);
  char* target = out.as<char>();
  for (int64_t outer = 0; outer < view.outer; ++outer) {
    for (int i = 0; i < call.input_count; ++i) {
      const Tensor& x = call.inputs[i];
      const size_t bytes = static_cast<size_t>(x.dims[axis]) * row_bytes;
      std::memcpy(target, x.as<char>() + static_cast<size_t>(outer) * bytes, bytes);
      target += bytes;
    }
  }
  return PK_OK;
}

}  // namespace pockc::ref
