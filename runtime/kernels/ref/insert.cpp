// insert(base, part; axis, start): base with part written over it from start on along axis. out may be base.
// insert(part; axis, start): the first part of a tensor that others complete. The rest of out stays.
#include "common.h"

namespace pockc::ref {
namespace {

struct Insert {
  int axis;
  int64_t start;
};

Insert read_insert(Attributes& attributes, const Tensor& base) {
  Insert insert;
  insert.axis = attributes.axis(base);
  insert.start = attributes.integer(0, kMaxElements);
  return insert;
}

const Tensor& base_of(const Call& call) { return call.input_count == 2 ? call.inputs[0] : call.outputs[0]; }

}  // namespace

Status check_insert(const Call& call) {
  if (!has_operands(call, 1, 2, 1, kNoWeight, kHalves)) return PK_BAD_FILE;
  const Tensor &base = base_of(call), &part = call.inputs[call.input_count - 1], &out = call.outputs[0];
  Attributes attributes(call);
  const Insert insert = read_insert(attributes, base);
  if (!attributes.valid() || !same_type(base, out) || part.dtype != base.dtype) return PK_BAD_FILE;
  if (!same_shape_except(base, part, insert.axis)) return PK_BAD_FILE;
  return verdict(insert.start <= base.dims[insert.axis] - part.dims[insert.axis]);
}

Status run_insert(const Call& call) {
  const Tensor &base = base_of(call), &part = call.inputs[call.input_count - 1], &out = call.outputs[0];
  Attributes attributes(call);
  const Insert insert = read_insert(attributes, base);
  const AxisView from = around_axis(part, insert.axis), to = around_axis(out, insert.axis);
  const size_t row_bytes = static_cast<size_t>(to.inner) * element_size(out.dtype);
  const size_t run_bytes = static_cast<size_t>(from.length) * row_bytes;
  const char* source = part.as<char>();
  if (out.data != base.data) std::memcpy(out.data, base.data, byte_count(out));
  for (int64_t outer = 0; outer < to.outer; ++outer) {
    const int64_t row = outer * to.length + insert.start;
    std::memcpy(out.as<char>() + static_cast<size_t>(row) * row_bytes, source, run_bytes);
    source += run_bytes;
  }
  return PK_OK;
}

}  // namespace pockc::ref
