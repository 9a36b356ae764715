// What the ways to compute conv2d_int8 share: the operands, the runs of inputs that belong to an output
// pixel, and what becomes of a sum.
#ifndef POCKC_SIMD_CONVOLUTION8_H_
#define POCKC_SIMD_CONVOLUTION8_H_

#include "simd/codes.h"
#include "simd/convolution.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

constexpr int kDepth = 1152;  // inputs of a pixel that are gathered at once: 3 x 3 of 128 channels

struct Job {
  Convolution c;
  const uint8_t* x;
  const uint8_t* w;
  const float* factor;
  const float* offset;
  uint8_t* y;
  int32_t zero;
  vf low, high;
};

// What makes codes of the sums of W output channels from o on, of which `valid` are meant.
struct Scale {
  vf factor, offset;

  POCKC_INLINE Scale(const Job& job, int64_t o, int64_t valid)
      : factor(load_n(job.factor + o, valid)), offset(load_n(job.offset + o, valid)) {}
  POCKC_INLINE vi codes(const Job& job, vi sum) const {
    return to_codes(to_float(sum) * factor + offset, job.low, job.high);
  }
};
#if defined(__ARM_NEON)
// The same of eight channels.
struct ScaleOfEight {
  Scale low, high;

  POCKC_INLINE ScaleOfEight(const Job& job, int64_t o, int64_t valid)
      : low(job, o, minimum<int64_t>(valid, W)),
        high(job, valid > W ? o + W : o, valid > W ? valid - W : minimum<int64_t>(valid, W)) {}

  POCKC_INLINE void store(const Job& job, vi low_sum, vi high_sum, uint8_t* y, int64_t valid) const {
    const auto first = reinterpret_cast<uint32x4_t>(low.codes(job, low_sum));
    const auto second = reinterpret_cast<uint32x4_t>(high.codes(job, high_sum));
    const uint8x8_t codes = vmovn_u16(vcombine_u16(vmovn_u32(first), vmovn_u32(second)));
    if (valid == 2 * W) {
      vst1_u8(y, codes);
      return;
    }
    uint8_t all[2 * W];
    vst1_u8(all, codes);
    for (int64_t i = 0; i < valid; ++i) y[i] = all[i];
  }
};
#endif

// Calls f(x, count) for the inputs that belong to rows [begin, end) of the weights, in that order: `count` of
// them lie at x, or outside of the image where x is null.
template <typename F>
POCKC_INLINE void for_runs(const Job& job, int64_t pixel, int64_t begin, int64_t end, F&& f) {
  const Convolution& c = job.c;
  const int64_t row = pixel / c.out_width, j = pixel - row * c.out_width;
  const int64_t image = row / c.out_height, i = row - image * c.out_height;
  for (int64_t k = begin; k < end;) {
    const int64_t tap = k / c.channels, from = k - tap * c.channels;
    const int64_t count = minimum(end - k, c.channels - from);
    const int64_t r = tap / c.kernel_w, s = tap - r * c.kernel_w;
    const int64_t h = i * c.stride[0] - c.padding[0] + r * c.dilation[0];
    const int64_t v = j * c.stride[1] - c.padding[2] + s * c.dilation[1];
    const bool inside = h >= 0 && h < c.height && v >= 0 && v < c.width;
    f(inside ? job.x + ((image * c.height + h) * c.width + v) * c.channels + from : nullptr, count);
    k += count;
  }
}

}  // namespace
}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_CONVOLUTION8_H_
