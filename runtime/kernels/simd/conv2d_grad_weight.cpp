// conv2d_grad_weight: dw[o, k] = sum over output pixels m of ct[m, o] patch[m, k]: a GEMM whose inner
// dimension is all output pixels, with ct read in place (transposed) and the patches of x packed on the fly
// as its right matrix. Sums over m run in blocks of kDepth that are added in order, so rounding grows with
// the block count, not with m. Workspace: gemm_scratch floats (depthwise: see convolution.h).
#include "simd/convolution.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

Convolution describe(const Call& call) {
  Convolution c;
  c.set_x(call.inputs[0]);
  c.set_y(call.inputs[1]);
  c.set_kernel(call.outputs[0]);
  Attributes attributes(call);
  int64_t kernel[2];
  attributes.tuple(kernel, 2);
  c.read_attributes(&attributes);
  return c;
}

// The product of a group, without its data.
Gemm product(const Call& call, const Convolution& c) {
  Gemm g;
  g.m = c.group_out();
  g.n = c.taps() * c.group_in();
  g.k = c.batch * c.out_height * c.out_width;
  g.a.transposed = true;
  g.a.dtype = call.inputs[1].dtype;
  g.a.stride = c.out_channels;
  g.b.stride = c.channels;
  g.c.stride = g.n;
  return g;
}

}  // namespace

bool accepts_conv2d_grad_weight(const Call& call) {
  const Convolution c = describe(call);
  if (!convolution_fits(call, c, call.inputs[1].dtype)) return false;
  if constexpr (!kHalfProducts) {
    if (c.depthwise()) return has_workspace(call, 0, kDepthwiseUnits * depthwise_floats(c));
  }
  return has_workspace(call, 0, gemm_scratch(product(call, c), thread_count(call)));
}

Status run_conv2d_grad_weight(const Call& call) {
  const Convolution c = describe(call);
  if constexpr (!kHalfProducts) {
    if (c.depthwise()) {
      depthwise_grad_weight(call, c);
      return PK_OK;
    }
  }
  Gemm g = product(call, c);
  for (int64_t group = 0; group < c.groups; ++group) {
    const Patches patches = c.patches(call.inputs[0], group);
    g.a.data = element(call.inputs[1], group * g.m);
    g.b.set(call.inputs[0], group * c.group_in(), c.channels);
    if (!c.pointwise()) g.b.patches = &patches;
    g.c.data = call.outputs[0].as<float>() + group * g.m * g.n;
    gemm_parallel(call, g, workspace(call));
  }
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
