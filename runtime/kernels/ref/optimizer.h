// Shared by the optimizer updates: operands p, g, slots (momenta) ..., scalars, and an optional list of
// positions.
//
// The update is written once, as a function of one element (p, g, slot elements), and applied to all of p, or
// only to the listed positions of p along `axis`; g and the slots then have only those positions. Outputs are
// the new p, then the new slots; each may be the very buffer of the old one.
//
// With a `start` of 0 or more, g has rows [start, start + n) of p, and those of p and of the (whole) slots
// are updated.
#ifndef POCKC_KERNELS_REF_OPTIMIZER_H_
#define POCKC_KERNELS_REF_OPTIMIZER_H_

#include "common.h"

namespace pockc::ref {

// Which part of p an update is of, beside the indices: what the call's last attributes say.
struct Part {
  int axis = 0;
  int64_t start = -1;
};

inline bool holds_rows(const Tensor& g, const Tensor& p, int64_t start) {
  return p.rank > 0 && same_shape_except(p, g, 0) && start <= p.dims[0] - g.dims[0];
}

// Scalars (lr f32, step i64) and the optional indices from operand `first` on: the last of what a call has.
inline bool fits_rest(const Call& call, int first, int scalars, const Part& part) {
  const Tensor& p = call.inputs[0];
  const Tensor& g = call.inputs[1];
  const int axis = part.axis;
  if (!is_scalar(call.inputs[first], DType::kF32)) return false;
  if (scalars == 2 && !is_scalar(call.inputs[first + 1], DType::kI64)) return false;
  if (part.start >= 0) return call.input_count == first + scalars && holds_rows(g, p, part.start);
  if (call.input_count == first + scalars) return same_shape(p, g);
  const Tensor& indices = call.inputs[first + scalars];
  return axis < p.rank && indices.dtype == DType::kI32 && indices.rank == 1 &&
         same_shape_except(p, g, axis) && g.dims[axis] == indices.dims[0];
}

// `state` operands (p, g, slots), then `scalars` (lr f32, step i64), then the optional indices.
inline bool fits_update(const Call& call, int state, int scalars, const Part& part) {
  const Tensor& p = call.inputs[0];
  const Tensor& g = call.inputs[1];
  if (!is_f32(p) || !same_type(p, call.outputs[0])) return false;
  for (int i = 1; i < state; ++i) {
    const Tensor& expected = i > 1 && part.start >= 0 ? p : g;
    if (!is_f32(call.inputs[i]) || !same_shape(call.inputs[i], expected)) return false;
    if (i > 1 && !same_type(call.inputs[i], call.outputs[i - 1])) return false;
  }
  return fits_rest(call, state, scalars, part);
}

// A slot of floats, element by element.
class FloatSlot {
 public:
  static constexpr bool kHasStart = true;  // whether its ops have the attribute

  FloatSlot(const Call& call, int index)
      : values_(call.inputs[2 + index].as<float>()), new_values_(call.outputs[1 + index].as<float>()) {}
  float at(int64_t i) const { return values_[i]; }
  void set(int64_t i, float value) { new_values_[i] = value; }

 private:
  const float* values_;
  float* new_values_;
};

// Elements in front of the updated rows, in p and in the slots.
inline int64_t elements_before(const Call& call, const Part& part) {
  return part.start <= 0 ? 0 : part.start * (call.inputs[0].elements() / call.inputs[0].dims[0]);
}

// Calls update(position in p, position in g and slots) for every updated element; both count from the first
// updated row.
template <typename Update>
Status for_each_updated(const Call& call, int operands, const Part& part, Update&& update) {
  const int axis = part.axis;
  const Tensor& p = call.inputs[0];
  const Tensor& new_p = call.outputs[0];
  const bool sparse = call.input_count > operands;
  if (sparse) {
    const Status status = require_range<int32_t>(call.inputs[operands], p.dims[axis], "index");
    if (status != PK_OK) return status;
  }
  if (new_p.data != p.data) std::memcpy(new_p.data, p.data, byte_count(p));
  for (int i = 1; part.start >= 0 && i < call.output_count; ++i) {
    const Tensor &slot = call.inputs[i + 1], &new_slot = call.outputs[i];
    if (new_slot.data != slot.data) std::memcpy(new_slot.data, slot.data, byte_count(slot));
  }
  if (!sparse) {
    const int64_t elements = call.inputs[1].elements();
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
inline Part updated_part(Attributes& attributes, bool has_start = true) {
  Part part;
  part.axis = static_cast<int>(attributes.integer(0, kMaxRank - 1));
  if (has_start) part.start = attributes.integer(-1, kMaxElements);
  return part;
}

}  // namespace pockc::ref

#endif  // POCKC_KERNELS_REF_OPTIMIZER_H_
