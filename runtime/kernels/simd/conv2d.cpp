// conv2d: y[m, o] = sum over k = (tap, channel) of patch[m, k] w[o, k], m over all output pixels: one
// implicit GEMM per group. Workspace: gemm_scratch floats (depthwise: see convolution.h).
#include "simd/convolution.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

Convolution describe(const Call& call, Epilogue* epilogue) {
  Convolution c;
  c.set_x(call.inputs[0]);
  c.set_kernel(call.inputs[1]);
  c.set_y(call.outputs[0]);
  Attributes attributes(call);
  c.read_attributes(&attributes);
  epilogue->activation = attributes.integer();
  epilogue->low = attributes.real();
  epilogue->high = attributes.real();
  if (call.input_count > 2) epilogue->bias = call.inputs[2].as<float>();
  return c;
}

// The product of the first group, for whose image matrix `patches` has to stay.
Gemm product(const Call& call, const Convolution& c, const Patches& patches) {
  Gemm g;
  g.m = c.batch * c.out_height * c.out_width;
  g.n = c.group_out();
  g.k = c.taps() * c.group_in();
  g.a.data = call.inputs[0].data;
  g.a.dtype = call.inputs[0].dtype;
  g.a.stride = c.channels;
  if (!c.pointwise()) g.a.patches = &patches;
  set_weight(call.inputs[1], 0, g.k, &g.b);
  g.b.transposed = true;
  g.c.data = call.outputs[0].data;
  g.c.dtype = call.outputs[0].dtype;
  g.c.stride = c.out_channels;
  return g;
}

}  // namespace

bool accepts_conv2d(const Call& call) {
  Epilogue epilogue;
  const Convolution c = describe(call, &epilogue);
  if (!convolution_fits(call, c, call.inputs[0].dtype)) return false;
  if (c.depthwise() && is_half(call.inputs[0].dtype) && epilogue.activation > kClip) return false;
  if constexpr (!kHalfProducts) {
    if (c.depthwise()) return has_workspace(call, 0, depthwise_floats(c));
  }
  return has_workspace(call, 0, gemm_scratch(product(call, c, Patches()), thread_count(call)));
}

Status run_conv2d(const Call& call) {
  Epilogue epilogue;
  const Convolution c = describe(call, &epilogue);
  if constexpr (!kHalfProducts) {
    if (c.depthwise()) {
      depthwise_forward(call, c, epilogue);
      return PK_OK;
    }
  }
  Patches patches;
  Gemm g = product(call, c, patches);
  g.epilogue = epilogue;
  for (int64_t group = 0; group < c.groups; ++group) {
    patches = c.patches(call.inputs[0], group);
    g.a.data = element(call.inputs[0], group * c.group_in());
    set_weight(call.inputs[1], group * g.n, g.k, &g.b);
    g.c.data = element(call.outputs[0], group * g.n);
    if (epilogue.bias != nullptr) g.epilogue.bias = epilogue.bias + group * g.n;
    gemm_parallel(call, g, workspace(call));
  }
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
