// conv2d_int8 without groups in sums of two products of 16 bits, or on ARM of one. Weights are taken as their
// codes, from 0 to 255, and what is too much, 128 times the sum of the inputs, is subtracted at the end.
#ifndef POCKC_SIMD_CONVOLUTION8_PAIRS_H_
#define POCKC_SIMD_CONVOLUTION8_PAIRS_H_

#include "simd/convolution8.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

constexpr int kPixels = W == 16 ? 12 : 6;  // of a tile: two vectors of sums each, and the registers are full

// The inputs of some output pixels, less the zero point, in the order of the weights' rows.
struct Tile {
  alignas(64) int16_t values[kPixels][kDepth];
  int32_t sums[kPixels];  // of the inputs gathered so far

  void clear() {
    for (int p = 0; p < kPixels; ++p) sums[p] = 0;
  }
};

void gather(const Job& job, int64_t pixel, int64_t begin, int64_t end, int16_t* to, int32_t* sum) {
  int32_t total = 0;
  for_runs(job, pixel, begin, end, [&](const uint8_t* x, int64_t count) POCKC_LAMBDA {
    if (x != nullptr) {
      for (int64_t n = 0; n < count; ++n) to[n] = static_cast<int16_t>(x[n] - job.zero);
      for (int64_t n = 0; n < count; ++n) total += to[n];
    } else {
      for (int64_t n = 0; n < count; ++n) to[n] = 0;
    }
    to += count;
  });
  if ((end - begin) % 2 != 0) *to = 0;  // the other half of the last pair
  *sum += total;
}

void gather(const Job& job, int64_t first, int64_t pixels, int64_t begin, int64_t end, Tile* tile) {
  for (int64_t p = 0; p < pixels; ++p) {
    gather(job, first + p, begin, end, tile->values[p], &tile->sums[p]);
  }
}

// Adds the products of rows [begin, end) of the weights, V vectors of output channels from o on. The last
// vector has `valid` channels.
#if defined(__ARM_NEON)
// `valid` codes, of up to eight.
POCKC_INLINE int16x8_t widen_eight(const uint8_t* p, int64_t valid) {
  uint8_t part[2 * W] = {};
  if (valid < 2 * W) {
    if (valid == W) {
      std::memcpy(part, p, W);
    } else {
      for (int64_t i = 0; i < valid; ++i) part[i] = p[i];
    }
    p = part;
  }
  return vreinterpretq_s16_u16(vmovl_u8(vld1_u8(p)));
}

// SMLAL takes a factor from a lane, so that four inputs of a pixel come with one load.
template <int V>
POCKC_INLINE void add_products(const Job& job, const Tile& tile, int64_t begin, int64_t end, int64_t o,
                               int64_t valid, vi (&sums)[kPixels][V]) {
  static_assert(V <= 2, "eight channels at most");
  const int64_t stride = job.c.out_channels, depth = end - begin, channels = (V - 1) * W + valid;
  const uint8_t* w = job.w + begin * stride + o;
  int32x4_t own[kPixels][V];  // in registers
  const auto each = [](auto f) POCKC_LAMBDA {
    POCKC_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      POCKC_UNROLL
      for (int v = 0; v < V; ++v) f(p, v);
    }
  };
  each([&](int p, int v) POCKC_LAMBDA { own[p][v] = reinterpret_cast<int32x4_t>(sums[p][v]); });
  const auto add = [&](auto input) POCKC_LAMBDA {
    const int16x8_t weights = widen_eight(w, channels);
    w += stride;
    each([&](int p, int v) POCKC_LAMBDA {
      const int16x4_t four = v == 0 ? vget_low_s16(weights) : vget_high_s16(weights);
      own[p][v] = vmlal_n_s16(own[p][v], four, input(p));
    });
  };
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    int16x4_t x[kPixels];
    POCKC_UNROLL
    for (int p = 0; p < kPixels; ++p) x[p] = vld1_s16(tile.values[p] + k);
    POCKC_UNROLL
    for (int lane = 0; lane < 4; ++lane) add([&](int p) POCKC_LAMBDA { return x[p][lane]; });
  }
  for (; k < depth; ++k) add([&](int p) POCKC_LAMBDA { return tile.values[p][k]; });
  each([&](int p, int v) POCKC_LAMBDA { sums[p][v] = reinterpret_cast<vi>(own[p][v]); });
}
#else
template <int V>
POCKC_INLINE void add_products(const Job& job, const Tile& tile, int64_t begin, int64_t end, int64_t o,
                               int64_t valid, vi (&sums)[kPixels][V]) {
  const int64_t stride = job.c.out_channels;
  const uint8_t* w = job.w + begin * stride + o;
  for (int64_t k = 0; k < end - begin; k += 2, w += 2 * stride) {
    vi pairs[V];
    POCKC_UNROLL
    for (int v = 0; v < V; ++v) {
      const int64_t lanes = v + 1 < V ? W : valid;
      const vi second = begin + k + 1 < end ? widen(w + stride + v * W, lanes) : vi{};
      pairs[v] = widen(w + v * W, lanes) | (second << 16);
    }
    POCKC_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      int32_t pair;
      __builtin_memcpy(&pair, &tile.values[p][k], sizeof(pair));
      POCKC_UNROLL
      for (int v = 0; v < V; ++v) sums[p][v] += pair_products(splat_int(pair), pairs[v]);
    }
  }
}
#endif

template <int V>
void tile_channels(const Job& job, Tile* tile, int64_t first, int64_t pixels, int64_t o, int64_t valid) {
  const int64_t depth = job.c.taps() * job.c.channels;
  vi sums[kPixels][V];
  for (int p = 0; p < kPixels; ++p) {
    for (int v = 0; v < V; ++v) sums[p][v] = vi{};
  }
  if (depth > kDepth) tile->clear();
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t end = minimum<int64_t>(depth, k + kDepth);
    if (depth > kDepth) gather(job, first, pixels, k, end, tile);
    if (valid == W) {
      add_products<V>(job, *tile, k, end, o, W, sums);
    } else {
      add_products<V>(job, *tile, k, end, o, valid, sums);
    }
  }
  uint8_t* y = job.y + first * job.c.out_channels + o;
#if defined(__ARM_NEON)
  const int64_t channels = (V - 1) * W + valid;
  const ScaleOfEight scale(job, o, channels);
  for (int p = 0; p < pixels; ++p, y += job.c.out_channels) {
    const vi rest = splat_int(kWeightZero * tile->sums[p]);
    scale.store(job, sums[p][0] - rest, sums[p][V - 1] - rest, y, channels);
  }
#else
  for (int v = 0; v < V; ++v, y += W) {
    const int64_t lanes = v + 1 < V ? W : valid;
    const Scale scale(job, o + v * W, lanes);
    for (int p = 0; p < pixels; ++p) {
      const vi sum = sums[p][v] - splat_int(kWeightZero * tile->sums[p]);
      narrow(y + p * job.c.out_channels, scale.codes(job, sum), lanes);
    }
  }
#endif
}

// Output pixels [begin, end) with all their channels.
void dense(const Job& shared, int64_t begin, int64_t end) {
  const Job job = shared;  // what it holds stays in registers: a byte that is written could be part of it
  const int64_t depth = job.c.taps() * job.c.channels, channels = job.c.out_channels;
  Tile tile = {};
  for (int64_t first = begin; first < end; first += kPixels) {
    const int64_t pixels = minimum<int64_t>(kPixels, end - first);
    tile.clear();
    if (depth <= kDepth) gather(job, first, pixels, 0, depth, &tile);
    for (int64_t o = 0; o < channels;) {
      const int64_t left = channels - o;
      if (left > W) {
        tile_channels<2>(job, &tile, first, pixels, o, minimum<int64_t>(W, left - W));
        o += 2 * W;
      } else {
        tile_channels<1>(job, &tile, first, pixels, o, left);
        o += W;
      }
    }
  }
}

}  // namespace
}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_CONVOLUTION8_PAIRS_H_
