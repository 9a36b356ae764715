// copy(x), reshape(x; shape): the same bytes. The planner usually makes a reshape a view; then out is x.
#include "common.h"

namespace pockc::ref {
namespace {

Status copy_bytes(const Call& call) {
  const Tensor& out = call.outputs[0];
  if (out.data != call.inputs[0].data) std::memcpy(out.data, call.inputs[0].data, byte_count(out));
  return PK_OK;
}

}  // namespace

Status check_copy(const Call& call) {
  return verdict(has_operands(call, 1, 1, 1, kNoWeight, kHalves) && no_attributes(call) &&
                 same_type(call.inputs[0], call.outputs[0]));
}

Status run_copy(const Call& call) { return copy_bytes(call); }

Status check_reshape(const Call& call) {
  if (!has_operands(call, 1, 1, 1, kNoWeight, kHalves)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &out = call.outputs[0];
  Attributes attributes(call);
  const Tuple shape = attributes.tuple(1, kMaxElements);
  return verdict(attributes.valid() && has_shape(out, shape) && x.dtype == out.dtype &&
                 x.elements() == out.elements());
}

Status run_reshape(const Call& call) { return copy_bytes(call); }

}  // namespace pockc::ref
