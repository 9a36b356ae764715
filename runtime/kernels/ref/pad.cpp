// pad(x; before, after, value): a constant border, f32.
#include "common.h"

namespace pockc::ref {

Status check_pad(const Call& call) {
  if (!has_operands(call, 1, 1, 1) || !all_f32(call)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &out = call.outputs[0];
  Attributes attributes(call);
  const Tuple before = attributes.tuple_of(x.rank, 0, kMaxElements);
  const Tuple after = attributes.tuple_of(x.rank, 0, kMaxElements);
  attributes.number();
  if (!attributes.valid() || x.rank != out.rank) return PK_BAD_FILE;
  for (int i = 0; i < x.rank; ++i) {
    if (out.dims[i] != before[i] + x.dims[i] + after[i]) return PK_BAD_FILE;
  }
  return PK_OK;
}

Status run_pad(const Call& call) {
  const Tensor &x = call.inputs[0], &out = call.outputs[0];
  Attributes attributes(call);
  const Tuple before = attributes.tuple(0, kMaxElements);
  attributes.tuple(0, kMaxElements);
  const float value = attributes.number_f32();
  float* target = out.as<float>();
  const int64_t elements = out.elements();
  for (int64_t i = 0; i < elements; ++i) target[i] = value;

  int64_t x_strides[kMaxRank] = {}, out_strides[kMaxRank] = {};
  dense_strides(x, x_strides);
  dense_strides(out, out_strides);
  Nest<2> nest;
  for (int i = 0; i < x.rank; ++i) {
    nest.append(x.dims[i], {out_strides[i], x_strides[i]});
    target += before[i] * out_strides[i];
  }
  const float* source = x.as<float>();
  nest.for_each_row([&](const int64_t (&at)[2], int64_t count) {
    for (int64_t i = 0; i < count; ++i) target[at[0] + i * nest.step(0)] = source[at[1] + i * nest.step(1)];
  });
  return PK_OK;
}

}  // namespace pockc::ref
