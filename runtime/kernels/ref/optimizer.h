// Shared by the optimizer updates: operands p, g, slots (momenta) ..., scalars, and an optional list of
// positions.
//
// The update is written once, as a function of one element (p, g, slot elements), and applied to all of p, or
// only to the listed positions of p along `axis`; g and the slots then have only those positions. Outputs are
// the new p, then the new slots; each may be the very buffer of the old one.
#ifndef POCKC_KERNELS_REF_OPTIMIZER_H_
#define POCKC_KERNELS_REF_OPTIMIZER_H_

#include "common.h"

namespace pockc::ref {

// Scalars (lr f32, step i64) and the optional indices from operand `first` on: the last of what a call has.
inline bool fits_rest(const Call& call, int first, int scalars, int axis) {
  const Tensor& p = call.inputs[0];
  const Tensor& g = call.inputs[1];
  if (!is_scalar(call.inputs[first], DType::kF32)) return false;
  if (scalars == 2 && !is_scalar(call.inputs[first + 1], DType::kI64)) return false;
  if (call.input_count == first + scalars) return same_shape(p, g);
  const Tensor& indices = call.inputs[first + scalars];
  return axis < p.rank && indices.dtype == DType::kI32 && indices.rank == 1 &&
         same_shape_except(p, g, axis) && g.dims[axis] == indices.dims[0];
}

// `state` operands (p, g, slots), then `scalars` (lr f32, step i64), then the optional indices. `axis` is
// what the call's attributes say.
inline bool fits_update(const Call& call, int state, int scalars, int axis) {
  const Tensor& p = call.inputs[0];
  const Tensor& g = call.inputs[1];
  if (!is_f32(p) || !same_type(p, call.outputs[0])) return false;
  for (int i = 1; i < state; ++i) {
    if (!is_f32(call.inputs[i]) || !same_shape(call.inputs[i], g)) return false;
    if (i > 1 && !same_type(call.inputs[i], call.outputs[i - 1])) return false;
  }
  return fits_rest(call, state, scalars, axis);
}

// A slot of floats, element by element.
class FloatSlot {
 public:
  FloatSlot(const Call& call, int index)
      : values_(call.inputs[2 + index].as<float>()), new_values_(call.outputs[1 + index].as<float>()) {}
  float at(int64_t i) const { return values_[i]; }
  void set(int64_t i, float value) { new_values_[i] = value; }

 private:
  const float* values_;
  float* new_values_;
};

// Calls update(position in p, position in g and slots) for every updated element.
template <typename Update>
Status for_each_updated(const Call& call, int operands, int axis, Update&& update) {
  const Tensor& p = call.inputs[0];
  const Tensor& new_p = call.outputs[0];
  const bool sparse = call.input_count > operands;
  if (sparse) {
    const Status status = require_range<int32_t>(call.inputs[operands], p.dims[axis], "index");
    if (status != PK_OK) return status;
  }
  if (new_p.data != p.data) std::memcpy(new_p.data, p.data, byte_count(p));
  if (!sparse) {
    const int64_t elements = p.elements();
    for (int64_t i = 0; i < elements; ++i) update(i, i);
    return PK_OK;
  }
  const int32_t* indices = call.inputs[operands].as<int32_t>();
  const int64_t listed = call.inputs[operands].dims[0];
  const AxisView view = around_axis(p, axis);
  for (int64_t outer = 0; outer < view.outer; ++outer) {
    for (int64_t k = 0; k < listed; ++k) {
      const int64_t to = (outer * view.length + indices[k]) * view.inner;
      const int64_t from = (outer * listed + k) * view.inner;
      for (int64_t i = 0; i < view.inner; ++i) update(to + i, from + i);
    }
  }
  return PK_OK;
}

// For optimizers, axis 0 is the default even of a scalar parameter; fits_update looks closer when it is used.
inline int update_axis(Attributes& attributes) {
  return static_cast<int>(attributes.integer(0, kMaxRank - 1));
}

}  // namespace pockc::ref

#endif  // POCKC_KERNELS_REF_OPTIMIZER_H_
