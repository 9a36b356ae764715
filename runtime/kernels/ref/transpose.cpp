// transpose(x; permutation): axis i of the output is axis permutation[i] of x. expand(x; shape): numpy
// broadcast_to.
#include "common.h"

namespace pockc::ref {
namespace {

// out[...] = x at the strides of the nest; tensor 0 is out.
Status gather(const Call& call, const Nest<2>& nest) {
  with_element(call.outputs[0].dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x = call.inputs[0].as<T>();
    T* out = call.outputs[0].as<T>();
    const int64_t out_step = nest.step(0), x_step = nest.step(1);
    nest.for_each_row([&](const int64_t (&at)[2], int64_t count) {
      for (int64_t i = 0; i < count; ++i) out[at[0] + i * out_step] = x[at[1] + i * x_step];
    });
  });
  return PK_OK;
}

}  // namespace

Status check_transpose(const Call& call) {
  if (!has_operands(call, 1, 1, 1, kNoWeight, kHalves)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &out = call.outputs[0];
  Attributes attributes(call);
  const Tuple permutation = attributes.tuple_of(x.rank, 0, x.rank - 1);
  if (!attributes.valid() || x.dtype != out.dtype || x.rank != out.rank) return PK_BAD_FILE;
  bool seen[kMaxRank] = {};
  for (int i = 0; i < x.rank; ++i) {
    const int64_t axis = permutation[i];
    if (seen[axis] || out.dims[i] != x.dims[axis]) return PK_BAD_FILE;
    seen[axis] = true;
  }
  return PK_OK;
}

Status run_transpose(const Call& call) {
  const Tensor &x = call.inputs[0], &out = call.outputs[0];
  const Tuple permutation = Attributes(call).tuple(0, kMaxRank);
  int64_t x_strides[kMaxRank] = {}, out_strides[kMaxRank] = {};
  dense_strides(x, x_strides);
  dense_strides(out, out_strides);
  Nest<2> nest;
  for (int i = 0; i < out.rank; ++i) nest.append(out.dims[i], {out_strides[i], x_strides[permutation[i]]});
  return gather(call, nest);
}

Status check_expand(const Call& call) {
  if (!has_operands(call, 1, 1, 1, kNoWeight, kHalves)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &out = call.outputs[0];
  Attributes attributes(call);
  const Tuple shape = attributes.tuple(1, kMaxElements);
  return verdict(attributes.valid() && has_shape(out, shape) && x.dtype == out.dtype &&
                 broadcasts_to(x, out));
}

Status run_expand(const Call& call) {
  return gather(call, broadcast_nest<2>(call.outputs[0], {&call.inputs[0]}));
}

}  // namespace pockc::ref
