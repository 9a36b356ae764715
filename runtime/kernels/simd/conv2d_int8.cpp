// conv2d_int8 (ref/conv2d_int8.cpp), without groups and depthwise. No workspace: weights lie in the file as
// the kernels read them, [tap][input channel][output channel].
//
// Both are vectorised over output channels and keep several pixels in registers. Weights are taken as their
// codes, from 0 to 255, and what is too much, 128 times the sum of the inputs, is subtracted at the end.
#include "simd/codes.h"
#include "simd/convolution.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

constexpr int kPixels = W == 16 ? 12 : 6;  // of a tile: two vectors of sums each, and the registers are full
constexpr int kRowPixels = 6;              // of a depthwise tile
constexpr int kDepth = 512;                // inputs of a tile's pixel that are gathered at once
constexpr int kMostProducts = 1 << 15;     // of 255 * 255 at most: sums of codes fit into 32 bits
constexpr int64_t kWorkGrain = 65536;      // products that are worth waking another thread

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

Convolution describe(const Call& call, Attributes* attributes) {
  Convolution c;
  const Tensor& w = call.inputs[1];
  c.set_x(call.inputs[0]);
  c.kernel_h = w.dims[0], c.kernel_w = w.dims[1];
  c.set_y(call.outputs[0]);
  c.read_attributes(attributes);
  return c;
}

POCKC_INLINE void finish(const Job& job, vi sum, int64_t pixel, int64_t o, int64_t valid) {
  const vf scaled = to_float(sum) * load_n(job.factor + o, valid) + load_n(job.offset + o, valid);
  narrow(job.y + pixel * job.c.out_channels + o, to_codes(scaled, job.low, job.high), valid);
}

// The inputs of some output pixels, less the zero point, in the order of the weights' rows.
struct Tile {
  alignas(64) int16_t values[kPixels][kDepth];
  int32_t sums[kPixels];  // of the inputs gathered so far

  void clear() {
    for (int p = 0; p < kPixels; ++p) sums[p] = 0;
  }
};

void gather(const Job& job, int64_t pixel, int64_t begin, int64_t end, int16_t* to, int32_t* sum) {
  const Convolution& c = job.c;
  const int64_t row = pixel / c.out_width, j = pixel - row * c.out_width;
  const int64_t image = row / c.out_height, i = row - image * c.out_height;
  int32_t total = 0;
  for (int64_t k = begin; k < end;) {
    const int64_t tap = k / c.channels, from = k - tap * c.channels;
    const int64_t count = minimum(end - k, c.channels - from);
    const int64_t r = tap / c.kernel_w, s = tap - r * c.kernel_w;
    const int64_t h = i * c.stride[0] - c.padding[0] + r * c.dilation[0];
    const int64_t v = j * c.stride[1] - c.padding[2] + s * c.dilation[1];
    if (h >= 0 && h < c.height && v >= 0 && v < c.width) {
      const uint8_t* x = job.x + ((image * c.height + h) * c.width + v) * c.channels + from;
      for (int64_t n = 0; n < count; ++n) to[n] = static_cast<int16_t>(x[n] - job.zero);
      for (int64_t n = 0; n < count; ++n) total += to[n];
    } else {
      for (int64_t n = 0; n < count; ++n) to[n] = 0;
    }
    to += count;
    k += count;
  }
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
  for (int p = 0; p < pixels; ++p) {
    for (int v = 0; v < V; ++v) {
      const vi sum = sums[p][v] - splat_int(kWeightZero * tile->sums[p]);
      finish(job, sum, first + p, o + v * W, v + 1 < V ? W : valid);
    }
  }
}

// Output pixels [begin, end) with all their channels.
void dense(const Job& job, int64_t begin, int64_t end) {
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
        sums[p] += pair_products(x, w);  // the upper halves of w are 0
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
