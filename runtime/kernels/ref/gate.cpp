// What a dynamic loss scale needs.
//   all_finite(x...) -> bool[], whether no element of any of the tensors is infinite or NaN
//   gate(is_open bool[], before...) -> f32[], 1; the session ends the entry here where the gate is shut. What
//   comes before it is read by nobody: an order of calls.
#include <cmath>

#include "common.h"

namespace pockc::ref {

Status check_all_finite(const Call& call) {
  if (!has_operands(call, 1, call.input_count, 1) || !no_attributes(call)) return PK_BAD_FILE;
  for (int i = 0; i < call.input_count; ++i) {
    if (!is_f32(call.inputs[i])) return PK_BAD_FILE;
  }
  return verdict(is_scalar(call.outputs[0], DType::kBool));
}

Status run_all_finite(const Call& call) {
  bool finite = true;
  for (int i = 0; i < call.input_count; ++i) {
    const float* x = call.inputs[i].as<float>();
    const int64_t elements = call.inputs[i].elements();
    for (int64_t j = 0; j < elements; ++j) finite &= std::isfinite(x[j]);
  }
  *call.outputs[0].as<uint8_t>() = finite ? 1 : 0;
  return PK_OK;
}

Status check_gate(const Call& call) {
  return verdict(has_operands(call, 1, call.input_count, 1) && no_attributes(call) &&
                 is_scalar(call.inputs[0], DType::kBool) && is_scalar(call.outputs[0], DType::kF32));
}

Status run_gate(const Call& call) {
  const bool is_open = *call.inputs[0].as<uint8_t>() != 0;
  *call.outputs[0].as<float>() = is_open ? 1.0f : 0.0f;
  return is_open ? PK_OK : kEntryEnds;
}

}  // namespace pockc::ref
