// conv2d_int8 (ref/conv2d_int8.cpp), without groups and depthwise. No workspace: weights lie in the file as
// the kernels read them, [tap][input channel][output channel].
//
// Both are vectorised over output channels and keep several pixels in registers.
#include "simd/convolution8_depthwise.h"
#if defined(__ARM_FEATURE_DOTPROD)
#include "simd/convolution8_dot.h"
#else
#include "simd/convolution8_pairs.h"
#endif

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

constexpr int kMostProducts = 1 << 15;  // of 255 * 255 at most: sums of codes fit into 32 bits
constexpr int64_t kWorkGrain = 65536;   // products that are worth waking another thread

Convolution describe(const Call& call, Attributes* attributes) {
  Convolution c;
  const Tensor& w = call.inputs[1];
  c.set_x(call.inputs[0]);
  c.kernel_h = w.dims[0], c.kernel_w = w.dims[1];
  c.set_y(call.outputs[0]);
  c.read_attributes(attributes);
  return c;
}

}  // namespace

bool accepts_conv2d_int8(const Call& call) {
  Attributes attributes(call);
  attributes.integer();
  const Convolution c = describe(call, &attributes);
  return c.depthwise() || (c.groups == 1 && c.taps() * c.channels <= kMostProducts);
}

Status run_conv2d_int8(const Call& call) {
  Attributes attributes(call);
  const auto zero = static_cast<int32_t>(attributes.integer());
  Job job = {describe(call, &attributes),
             call.inputs[0].as<uint8_t>(),
             call.inputs[1].as<uint8_t>(),
             call.inputs[2].as<float>(),
             call.inputs[3].as<float>(),
             call.outputs[0].as<uint8_t>(),
             zero,
             vf{},
             vf{}};
  job.low = splat(static_cast<float>(attributes.integer()));
  job.high = splat(static_cast<float>(attributes.integer()));
  const Convolution& c = job.c;
  const int64_t rows = c.batch * c.out_height;
  if (c.depthwise()) {
    const int64_t work = c.out_width * c.channels * c.taps();
    parallel(call, rows, divide_up(kWorkGrain, work),
             [&](int64_t begin, int64_t end, int) { depthwise(job, begin, end); });
    return PK_OK;
  }
  const int64_t work = c.taps() * c.channels * c.out_channels;
  parallel(call, rows * c.out_width, round_up(divide_up(kWorkGrain, work), kPixels),
           [&](int64_t begin, int64_t end, int) { dense(job, begin, end); });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
