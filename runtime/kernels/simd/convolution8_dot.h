// conv2d_int8 without groups in dot products of four bytes: UDOT of 64-bit ARM, from ARMv8.2 on where a CPU
// has it.
//
// A code x of the input means x - z, a code w of the weights w - 128, and UDOT multiplies codes as they are:
//   sum (x - z)(w - 128) = sum x w - 128 sum x - z sum w + 128 z n
// over the n products of an output; outside of the image x is z. All of it is exact modulo 2^32, and the
// result fits, so that the bits are those of any other order.
//
// Weights lie in the file as [row][output channel]. UDOT wants four rows of a channel side by side, so 16
// channels at a time are brought into that order, and used for kGathered pixels.
#ifndef POCKC_SIMD_CONVOLUTION8_DOT_H_
#define POCKC_SIMD_CONVOLUTION8_DOT_H_

#include "simd/convolution8.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

constexpr int kPixels = 6;  // of a tile: with four vectors of channels each, 24 of the 32 registers are sums
constexpr int kGathered = 24;  // pixels for which weights are rearranged once
constexpr int kChannels = 16;

struct Block {
  uint32_t x[kGathered][kDepth / 4];  // four codes each, zeros behind the last
  uint8_t w[kDepth / 4][4 * kChannels];
  uint32_t x_sums[kGathered];
  uint32_t w_sums[kChannels];
  uint32_t sums[kGathered][kChannels];
};

POCKC_INLINE uint32_t sum_of_codes(const uint8_t* codes, int64_t count) {
  uint32x4_t total = vdupq_n_u32(0);
  for (int64_t k = 0; k < count; k += 16) {
    total = vdotq_u32(total, vld1q_u8(codes + k), vdupq_n_u8(1));
  }
  return vaddvq_u32(total);
}

// The inputs of some output pixels, in the order of the weights' rows.
void gather(const Job& job, int64_t first, int64_t pixels, int64_t begin, int64_t end, Block* block) {
  for (int64_t p = 0; p < pixels; ++p) {
    uint8_t* const codes = reinterpret_cast<uint8_t*>(block->x[p]);
    uint8_t* to = codes;
    for_runs(job, first + p, begin, end, [&](const uint8_t* x, int64_t count) POCKC_LAMBDA {
      if (x == nullptr) {
        std::memset(to, job.zero, static_cast<size_t>(count));
      } else {
        std::memcpy(to, x, static_cast<size_t>(count));
      }
      to += count;
    });
    const int64_t whole = round_up(end - begin, 16);
    std::memset(to, 0, static_cast<size_t>(whole - (end - begin)));
    block->x_sums[p] += sum_of_codes(codes, whole);
  }
}

// Rows [begin, end) of the weights of output channels [o, o + valid), zeros behind the last of both.
void rearrange(const Job& job, int64_t begin, int64_t end, int64_t o, int64_t valid, Block* block) {
  const int64_t stride = job.c.out_channels;
  uint8x16x4_t rows;
  for (int64_t k = begin; k < end; k += 4) {
    for (int r = 0; r < 4; ++r) {
      const uint8_t* w = job.w + (k + r) * stride + o;
      uint8_t part[kChannels] = {};
      if (k + r < end && valid < kChannels) std::memcpy(part, w, static_cast<size_t>(valid));
      rows.val[r] = vld1q_u8(k + r < end && valid == kChannels ? w : part);
    }
    vst4q_u8(block->w[(k - begin) / 4], rows);
  }
}

void add_weights(int64_t steps, Block* block) {
  for (int v = 0; v < kChannels / 4; ++v) {
    uint32x4_t total = vld1q_u32(block->w_sums + 4 * v);
    for (int64_t step = 0; step < steps; ++step) {
      total = vdotq_u32(total, vld1q_u8(block->w[step] + 16 * v), vdupq_n_u8(1));
    }
    vst1q_u32(block->w_sums + 4 * v, total);
  }
}

// Adds the products of a tile's pixels, from p on, with V vectors of channels.
template <int V>
void add_products(int64_t steps, int64_t p, Block* block) {
  const uint32_t (*x)[kDepth / 4] = block->x + p;
  uint32x4_t sums[kPixels][V];
  POCKC_UNROLL
  for (int i = 0; i < kPixels; ++i) {
    POCKC_UNROLL
    for (int v = 0; v < V; ++v) sums[i][v] = vld1q_u32(block->sums[p + i] + 4 * v);
  }
  for (int64_t step = 0; step < steps; ++step) {
    uint8x16_t w[V];
    POCKC_UNROLL
    for (int v = 0; v < V; ++v) w[v] = vld1q_u8(block->w[step] + 16 * v);
    POCKC_UNROLL
    for (int i = 0; i < kPixels; ++i) {
      const uint8x16_t codes = vreinterpretq_u8_u32(vld1q_dup_u32(x[i] + step));
      POCKC_UNROLL
      for (int v = 0; v < V; ++v) sums[i][v] = vdotq_u32(sums[i][v], w[v], codes);
    }
  }
  POCKC_UNROLL
  for (int i = 0; i < kPixels; ++i) {
    POCKC_UNROLL
    for (int v = 0; v < V; ++v) vst1q_u32(block->sums[p + i] + 4 * v, sums[i][v]);
  }
}

void add_products(int64_t steps, int64_t pixels, int64_t valid, Block* block) {
  static constexpr decltype(&add_products<1>) kByVectors[] = {add_products<1>, add_products<2>,
                                                              add_products<3>, add_products<4>};
  for (int64_t p = 0; p < pixels; p += kPixels) kByVectors[(valid - 1) / 4](steps, p, block);
}

// What becomes of the sums of output channels [o, o + valid) of some pixels.
void finish_channels(const Job& shared, int64_t first, int64_t pixels, int64_t o, int64_t valid,
                     const Block& block) {
  const Job job = shared;  // what it holds stays in registers: a byte that is written could be part of it
  const uint32_t zero = static_cast<uint32_t>(job.zero);
  const uint32_t n = static_cast<uint32_t>(job.c.taps() * job.c.channels);
  for (int64_t v = 0; v < valid; v += 2 * W) {
    const int64_t count = minimum<int64_t>(valid - v, 2 * W);
    const ScaleOfEight scale(job, o + v, count);
    const uint32x4_t low = vmulq_n_u32(vld1q_u32(block.w_sums + v), zero);
    const uint32x4_t high = vmulq_n_u32(vld1q_u32(block.w_sums + v + W), zero);
    uint8_t* y = job.y + first * job.c.out_channels + o + v;
    for (int64_t p = 0; p < pixels; ++p, y += job.c.out_channels) {
      const uint32x4_t rest = vdupq_n_u32(kWeightZero * (zero * n - block.x_sums[p]));
      const uint32_t* sums = block.sums[p] + v;
      scale.store(job, reinterpret_cast<vi>(vsubq_u32(vaddq_u32(vld1q_u32(sums), rest), low)),
                  reinterpret_cast<vi>(vsubq_u32(vaddq_u32(vld1q_u32(sums + W), rest), high)), y, count);
    }
  }
}

// Output channels [o, o + valid) of some pixels.
void block_channels(const Job& job, int64_t first, int64_t pixels, int64_t o, int64_t valid, Block* block) {
  const int64_t depth = job.c.taps() * job.c.channels;
  std::memset(block->sums, 0, sizeof(block->sums));
  std::memset(block->w_sums, 0, sizeof(block->w_sums));
  if (depth > kDepth) std::memset(block->x_sums, 0, sizeof(block->x_sums));
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t end = minimum<int64_t>(depth, k + kDepth), steps = divide_up(end - k, 4);
    if (depth > kDepth) gather(job, first, pixels, k, end, block);
    rearrange(job, k, end, o, valid, block);
    if (job.zero != 0) add_weights(steps, block);
    add_products(steps, pixels, valid, block);
  }
  finish_channels(job, first, pixels, o, valid, *block);
}

// Output pixels [begin, end) with all their channels.
void dense(const Job& job, int64_t begin, int64_t end) {
  const int64_t depth = job.c.taps() * job.c.channels, channels = job.c.out_channels;
  Block block = {};
  for (int64_t first = begin; first < end; first += kGathered) {
    const int64_t pixels = minimum<int64_t>(kGathered, end - first);
    std::memset(block.x_sums, 0, sizeof(block.x_sums));
    if (depth <= kDepth) gather(job, first, pixels, 0, depth, &block);
    for (int64_t o = 0; o < channels; o += kChannels) {
      block_channels(job, first, pixels, o, minimum<int64_t>(kChannels, channels - o), &block);
    }
  }
}

}  // namespace
}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_CONVOLUTION8_DOT_H_
