// argmax(x; axis) -> i64 without that axis, the first of equal maxima; cumsum(x; axis), f32 or i64.
#include "common.h"

namespace pockc::ref {

Status check_argmax(const Call& call) {
  if (!has_operands(call, 1, 1, 1) || !is_f32(call.inputs[0])) return PK_BAD_FILE;
  const Tensor& x = call.inputs[0];
  Attributes attributes(call);
  const int axis = attributes.axis(x);
  if (!attributes.valid()) return PK_BAD_FILE;
  Tuple shape;
  for (int i = 0; i < x.rank; ++i) {
    if (i != axis) shape.values[shape.size++] = x.dims[i];
  }
  return verdict(call.outputs[0].dtype == DType::kI64 && has_shape(call.outputs[0], shape));
}

Status run_argmax(const Call& call) {
  const Tensor& x = call.inputs[0];
  const AxisView view = around_axis(x, Attributes(call).axis(x));
  int64_t* out = call.outputs[0].as<int64_t>();
  for (int64_t line = 0; line < view.outer * view.inner; ++line) {
    const float* data = x.as<float>() + line / view.inner * view.length * view.inner + line % view.inner;
    int64_t best = 0;
    for (int64_t k = 1; k < view.length; ++k) {
      const float value = data[k * view.inner], highest = data[best * view.inner];
      const bool first_nan = value != value && highest == highest;
      if (value > highest || first_nan) best = k;
    }
    out[line] = best;
  }
  return PK_OK;
}

Status check_cumsum(const Call& call) {
  if (!has_operands(call, 1, 1, 1)) return PK_BAD_FILE;
  const Tensor& x = call.inputs[0];
  Attributes attributes(call);
  attributes.axis(x);
  return verdict(attributes.valid() && same_type(x, call.outputs[0]) &&
                 (is_f32(x) || x.dtype == DType::kI64));
}

namespace {

template <typename T, typename Total>
void cumulate(const Call& call, const AxisView& view) {
  const T* x = call.inputs[0].as<T>();
  T* out = call.outputs[0].as<T>();
  for (int64_t line = 0; line < view.outer * view.inner; ++line) {
    const int64_t start = line / view.inner * view.length * view.inner + line % view.inner;
    Total total = 0;
    for (int64_t k = 0; k < view.length; ++k) {
      total += static_cast<Total>(x[start + k * view.inner]);
      out[start + k * view.inner] = static_cast<T>(total);
    }
  }
}

}  // namespace

Status run_cumsum(const Call& call) {
  const AxisView view = around_axis(call.inputs[0], Attributes(call).axis(call.inputs[0]));
  if (is_f32(call.inputs[0])) {
    cumulate<float, double>(call, view);
  } else {
    cumulate<int64_t, uint64_t>(call, view);
  }
  return PK_OK;
}

}  // namespace pockc::ref
