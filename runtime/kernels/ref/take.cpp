// take(x, indices i32[k]; axis): the listed positions of an axis, in that order.
// take_grad(ct, indices; axis, size): adds each slice of ct to its position in zeros; an index may repeat.
// An index outside the axis: PK_INVALID_ARGUMENT.
#include "common.h"

namespace pockc::ref {
namespace {

bool is_index_list(const Tensor& indices) { return indices.dtype == DType::kI32 && indices.rank == 1; }

}  // namespace

Status check_take(const Call& call) {
  if (!has_operands(call, 2, 2, 1, kNoWeight, kHalves)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &indices = call.inputs[1], &out = call.outputs[0];
  Attributes attributes(call);
  const int axis = attributes.axis(x);
  return verdict(attributes.valid() && is_index_list(indices) && x.dtype == out.dtype &&
                 same_shape_except(x, out, axis) && out.dims[axis] == indices.dims[0]);
}

Status run_take(const Call& call) {
  const Tensor &x = call.inputs[0], &indices = call.inputs[1];
  const int axis = Attributes(call).axis(x);
  const Status status = require_range<int32_t>(indices, x.dims[axis], "index");
  if (status != PK_OK) return status;
  const AxisView view = around_axis(x, axis);
  const size_t row_bytes = static_cast<size_t>(view.inner) * element_size(x.dtype);
  char* target = call.outputs[0].as<char>();
  for (int64_t outer = 0; outer < view.outer; ++outer) {
    for (int64_t k = 0; k < indices.dims[0]; ++k) {
      const int64_t row = outer * view.length + indices.as<int32_t>()[k];
      std::memcpy(target, x.as<char>() + static_cast<size_t>(row) * row_bytes, row_bytes);
      target += row_bytes;
    }
  }
  return PK_OK;
}

Status check_take_grad(const Call& call) {
  if (!has_operands(call, 2, 2, 1)) return PK_BAD_FILE;
  const Tensor &ct = call.inputs[0], &indices = call.inputs[1], &out = call.outputs[0];
  Attributes attributes(call);
  const int axis = attributes.axis(ct);
  const int64_t size = attributes.integer(1, kMaxElements);
  return verdict(attributes.valid() && is_index_list(indices) && is_f32(ct) && is_f32(out) &&
                 same_shape_except(ct, out, axis) && ct.dims[axis] == indices.dims[0] &&
                 out.dims[axis] == size);
}

Status run_take_grad(const Call& call) {
  const Tensor &ct = call.inputs[0], &indices = call.inputs[1], &out = call.outputs[0];
  const int axis = Attributes(call).axis(ct);
  const Status status = require_range<int32_t>(indices, out.dims[axis], "index");
  if (status != PK_OK) return status;
  const AxisView view = around_axis(out, axis);
  const float* source = ct.as<float>();
  fill_zero(out);
  for (int64_t outer = 0; outer < view.outer; ++outer) {
    for (int64_t k = 0; k < indices.dims[0]; ++k) {
      const int64_t row = outer * view.length + indices.as<int32_t>()[k];
      add_scaled(1.0f, source, out.as<float>() + row * view.inner, view.inner);
      source += view.inner;
    }
  }
  return PK_OK;
}

}  // namespace pockc::ref
