// A tile of a depthwise conv2d_int8: some neighbouring output pixels of a row, and their channels.
#ifndef POCKC_SIMD_CONVOLUTION8_DEPTHWISE_H_
#define POCKC_SIMD_CONVOLUTION8_DEPTHWISE_H_

#include "simd/convolution8.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

constexpr int kRowPixels = 6;  // of a tile

#if defined(__ARM_NEON)
// Codes less their zero points fit into 16 bits, and SMLAL adds products of these to sums of 32: eight
// channels at a time, in half the instructions of products of 32 bits.
constexpr int kTileChannels = 8;
using TileScale = ScaleOfEight;

class Sums {
 public:
  static POCKC_INLINE int16x8_t input(const uint8_t* p, int64_t valid, int32_t zero) {
    return less(p, valid, zero);
  }
  static POCKC_INLINE int16x8_t weight(const uint8_t* p, int64_t valid) {
    return less(p, valid, kWeightZero);
  }

  POCKC_INLINE void add(int16x8_t x, int16x8_t w) {
    low_ = vmlal_s16(low_, vget_low_s16(x), vget_low_s16(w));
    high_ = vmlal_s16(high_, vget_high_s16(x), vget_high_s16(w));
  }
  POCKC_INLINE void finish(const Job& job, const TileScale& scale, uint8_t* y, int64_t valid) const {
    scale.store(job, reinterpret_cast<vi>(low_), reinterpret_cast<vi>(high_), y, valid);
  }

 private:
  static POCKC_INLINE int16x8_t less(const uint8_t* p, int64_t valid, int32_t zero) {
    uint8_t part[kTileChannels] = {};
    if (valid < kTileChannels) {
      for (int64_t i = 0; i < valid; ++i) part[i] = p[i];
      p = part;
    }
    return vreinterpretq_s16_u16(vsubl_u8(vld1_u8(p), vdup_n_u8(static_cast<uint8_t>(zero))));
  }

  int32x4_t low_ = {}, high_ = {};
};
#else
constexpr int kTileChannels = W;
using TileScale = Scale;

// Weights are taken as their codes, and what is too much, kWeightZero times the sum of the inputs, is
// subtracted at the end.
class Sums {
 public:
  static POCKC_INLINE vi input(const uint8_t* p, int64_t valid, int32_t zero) {
    return widen(p, valid) - splat_int(zero);
  }
  static POCKC_INLINE vi weight(const uint8_t* p, int64_t valid) { return widen(p, valid); }

  POCKC_INLINE void add(vi x, vi w) {
    sum_ += products(x, w);
    inputs_ += x;
  }
  POCKC_INLINE void finish(const Job& job, const TileScale& scale, uint8_t* y, int64_t valid) const {
    narrow(y, scale.codes(job, sum_ - inputs_ * kWeightZero), valid);
  }

 private:
  vi sum_ = {}, inputs_ = {};
};
#endif

// Channels [o, o + valid) of output pixels [j, j + pixels) of a row. Without Edge the tile is whole, and all
// its taps are inside of their input rows.
template <bool Edge>
POCKC_INLINE void depthwise_tile(const Job& job, int64_t row, int64_t j, int64_t pixels, int64_t o,
                                 int64_t valid) {
  const Convolution& c = job.c;
  const int64_t image = row / c.out_height, i = row - image * c.out_height;
  const int64_t first = j * c.stride[1] - c.padding[2], step = c.stride[1] * c.channels;
  Sums sums[kRowPixels];
  for (int64_t r = 0; r < c.kernel_h; ++r) {
    const int64_t h = i * c.stride[0] - c.padding[0] + r * c.dilation[0];
    if (h < 0 || h >= c.height) continue;
    const uint8_t* line = job.x + (image * c.height + h) * c.width * c.channels + o;
    for (int64_t s = 0; s < c.kernel_w; ++s) {
      const auto w = Sums::weight(job.w + (r * c.kernel_w + s) * c.channels + o, valid);
      const int64_t at = first + s * c.dilation[1];
      const uint8_t* x = line + at * c.channels;
      POCKC_UNROLL
      for (int p = 0; p < kRowPixels; ++p) {
        const int64_t v = at + p * c.stride[1];
        if (Edge && (p >= pixels || v < 0 || v >= c.width)) continue;
        sums[p].add(Sums::input(x + p * step, valid, job.zero), w);
      }
    }
  }
  const TileScale scale(job, o, valid);
  uint8_t* y = job.y + (row * c.out_width + j) * c.channels + o;
  POCKC_UNROLL
  for (int p = 0; p < kRowPixels; ++p) {
    if (!Edge || p < pixels) sums[p].finish(job, scale, y + p * c.channels, valid);
  }
}

// Output rows [begin, end).
void depthwise(const Job& shared, int64_t begin, int64_t end) {
  const Job job = shared;  // what it holds stays in registers: a byte that is written could be part of it
  const Convolution& c = job.c;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t j = 0; j < c.out_width; j += kRowPixels) {
      const int64_t pixels = minimum<int64_t>(kRowPixels, c.out_width - j);
      const int64_t first = j * c.stride[1] - c.padding[2];
      const int64_t last = first + (kRowPixels - 1) * c.stride[1] + (c.kernel_w - 1) * c.dilation[1];
      const bool inside = pixels == kRowPixels && first >= 0 && last < c.width;
      const auto run = [&](int64_t o, int64_t valid) POCKC_LAMBDA {
        if (inside) {
          depthwise_tile<false>(job, row, j, pixels, o, valid);
        } else {
          depthwise_tile<true>(job, row, j, pixels, o, valid);
        }
      };
      int64_t o = 0;
      for (; o + kTileChannels <= c.channels; o += kTileChannels) run(o, kTileChannels);
      if (o < c.channels) run(o, c.channels - o);
    }
  }
}

}  // namespace
}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_CONVOLUTION8_DEPTHWISE_H_
