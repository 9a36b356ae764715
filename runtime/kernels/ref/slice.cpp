// slice(x; axis, start, stop, step) and its gradient slice_grad(ct; axis, start, step, size): zeros
// elsewhere.
#include "common.h"

namespace pockc::ref {
namespace {

struct Slice {
  int axis;
  int64_t start, stop, step;
};

Slice read_slice(Attributes& attributes, const Tensor& x) {
  Slice slice;
  slice.axis = attributes.axis(x);
  slice.start = attributes.integer(0, kMaxElements);
  slice.stop = attributes.integer(1, kMaxElements);
  slice.step = attributes.integer(1, kMaxElements);
  return slice;
}

struct SliceGrad {
  int axis;
  int64_t start, step, size;
};

SliceGrad read_slice_grad(Attributes& attributes, const Tensor& ct) {
  SliceGrad grad;
  grad.axis = attributes.axis(ct);
  grad.start = attributes.integer(0, kMaxElements);
  grad.step = attributes.integer(1, kMaxElements);
  grad.size = attributes.integer(1, kMaxElements);
  return grad;
}

}  // namespace

Status check_slice(const Call& call) {
  if (!has_operands(call, 1, 1, 1, kNoWeight, kHalves)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &out = call.outputs[0];
  Attributes attributes(call);
  const Slice slice = read_slice(attributes, x);
  if (!attributes.valid() || x.dtype != out.dtype || !same_shape_except(x, out, slice.axis))
    return PK_BAD_FILE;
  const int64_t length = (slice.stop - slice.start + slice.step - 1) / slice.step;
  return verdict(slice.start < slice.stop && slice.stop <= x.dims[slice.axis] &&
                 out.dims[slice.axis] == length);
}

Status run_slice(const Call& call) {
  const Tensor &x = call.inputs[0], &out = call.outputs[0];
  Attributes attributes(call);
  const Slice slice = read_slice(attributes, x);
  const AxisView from = around_axis(x, slice.axis), to = around_axis(out, slice.axis);
  const size_t width = element_size(x.dtype);
  const size_t row_bytes = static_cast<size_t>(from.inner) * width;
  // With step 1 neighbours along the axis are one run of bytes.
  const int64_t runs = slice.step == 1 ? 1 : to.length;
  const size_t run_bytes = slice.step == 1 ? row_bytes * static_cast<size_t>(to.length) : row_bytes;
  const char* source = x.as<char>();
  char* target = out.as<char>();
  for (int64_t outer = 0; outer < from.outer; ++outer) {
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t row = outer * from.length + slice.start + run * slice.step;
      std::memcpy(target, source + static_cast<size_t>(row) * row_bytes, run_bytes);
      target += run_bytes;
    }
  }
  return PK_OK;
}

Status check_slice_grad(const Call& call) {
  if (!has_operands(call, 1, 1, 1)) return PK_BAD_FILE;
  const Tensor &ct = call.inputs[0], &out = call.outputs[0];
  Attributes attributes(call);
  const SliceGrad grad = read_slice_grad(attributes, ct);
  if (!attributes.valid() || !all_f32(call) || !same_shape_except(ct, out, grad.axis)) return PK_BAD_FILE;
  // start + (length - 1) * step < size, without the product overflowing.
  const int64_t room = grad.size - 1 - grad.start;
  return verdict(out.dims[grad.axis] == grad.size && room >= 0 && ct.dims[grad.axis] - 1 <= room / grad.step);
}

Status run_slice_grad(const Call& call) {
  const Tensor &ct = call.inputs[0], &out = call.outputs[0];
  Attributes attributes(call);
  const SliceGrad grad = read_slice_grad(attributes, ct);
  const AxisView view = around_axis(ct, grad.axis);
  const size_t row_bytes = static_cast<size_t>(view.inner) * sizeof(float);
  const float* source = ct.as<float>();
  fill_zero(out);
  for (int64_t outer = 0; outer < view.outer; ++outer) {
    for (int64_t k = 0; k < view.length; ++k) {
      const int64_t row = outer * grad.size + grad.start + k * grad.step;
      std::memcpy(out.as<float>() + row * view.inner, source, row_bytes);
      source += view.inner;
    }
  }
  return PK_OK;
}

}  // namespace pockc::ref
