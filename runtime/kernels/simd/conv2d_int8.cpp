// conv2d_int8 (ref/conv2d_int8.cpp), without groups and depthwise. No workspace: weights lie in the file as
// the kernels read them, [tap][input channel][output channel].
//
// Both are vectorised over output channels and keep several pixels in registers.
#if defined(__ARM_FEATURE_DOTPROD)
#include "simd/convolution8_dot.h"
#else
#include "simd/convolution8_pairs.h"
#endif

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

constexpr int kRowPixels = 6;           // of a depthwise tile
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

// A depthwise tile: channels [o, o + valid) of output pixels [j, j + pixels) of a row. Without Edge the tile
// is whole, and all its taps are inside of their input rows.
template <bool Edge>
POCKC_INLINE void depthwise_tile(const Job& job, int64_t row, int64_t j, int64_t pixels, int64_t o,
                                 int64_t valid) {
  const Convolution& c = job.c;
  const int64_t image = row / c.out_height, i = row - image * c.out_height;
  const int64_t first = j * c.stride[1] - c.padding[2];
  const vi zero = splat_int(job.zero);
  vi sums[kRowPixels], inputs[kRowPixels];
  for (int p = 0; p < kRowPixels; ++p) sums[p] = inputs[p] = vi{};
  for (int64_t r = 0; r < c.kernel_h; ++r) {
    const int64_t h = i * c.stride[0] - c.padding[0] + r * c.dilation[0];
    if (h < 0 || h >= c.height) continue;
    const uint8_t* line = job.x + (image * c.height + h) * c.width * c.channels + o;
    for (int64_t s = 0; s < c.kernel_w; ++s) {
      const vi w = widen(job.w + (r * c.kernel_w + s) * c.channels + o, valid);
      POCKC_UNROLL
      for (int p = 0; p < kRowPixels; ++p) {
        const int64_t v = first + p * c.stride[1] + s * c.dilation[1];
        if (Edge && (p >= pixels || v < 0 || v >= c.width)) continue;
        const vi x = widen(line + v * c.channels, valid) - zero;
        sums[p] += products(x, w);
        inputs[p] += x;
      }
    }
  }
  for (int p = 0; p < kRowPixels; ++p) {
    if (Edge && p >= pixels) break;
    finish(job, sums[p] - inputs[p] * kWeightZero, row * c.out_width + j + p, o, valid);
  }
}

void depthwise(const Job& job, int64_t begin, int64_t end) {
  const Convolution& c = job.c;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t j = 0; j < c.out_width; j += kRowPixels) {
      const int64_t pixels = minimum<int64_t>(kRowPixels, c.out_width - j);
      const int64_t first = j * c.stride[1] - c.padding[2];
      const int64_t last = first + (kRowPixels - 1) * c.stride[1] + (c.kernel_w - 1) * c.dilation[1];
      const bool inside = pixels == kRowPixels && first >= 0 && last < c.width;
      for_vectors(0, c.channels, [&](int64_t o, int64_t valid) POCKC_LAMBDA {
        if (inside) {
          depthwise_tile<false>(job, row, j, pixels, o, valid);
        } else {
          depthwise_tile<true>(job, row, j, pixels, o, valid);
        }
      });
    }
  }
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
