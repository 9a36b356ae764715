// The sums of a tile on 64-bit ARM, where a multiply-add takes one factor from any lane of a vector: four
// values of A come with one load. Left to themselves compilers load each value alone, and move sums between
// registers.
#ifndef POCKC_SIMD_GEMM_LANES_H_
#define POCKC_SIMD_GEMM_LANES_H_

#include "simd/gemm_ahead.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

constexpr int kVectorRegisters = 32;

// A step of k for rows [0, Rows): sum[i][j] += factor(i) * a vector of B.
template <int Rows, int V, typename Factor>
POCKC_INLINE void add_step(const float* b, vf (*sum)[V], Factor&& factor) {
  vf right[V];
  POCKC_UNROLL
  for (int j = 0; j < V; ++j) right[j] = load(b + j * W);
  POCKC_UNROLL
  for (int i = 0; i < Rows; ++i) {
    POCKC_UNROLL
    for (int j = 0; j < V; ++j) sum[i][j] = vfmaq_n_f32(sum[i][j], right[j], factor(i));
  }
}

// W steps for Rows rows, and then for the Rest: all of them at once where B, the sums and a vector of each
// row fit into registers.
template <int Rows, int Rest, int V>
POCKC_INLINE void add_lanes(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                            vf (*sum)[V]) {
  vf left[Rows];
  POCKC_UNROLL
  for (int i = 0; i < Rows; ++i) left[i] = load(a + i * a_stride);
  POCKC_UNROLL
  for (int lane = 0; lane < W; ++lane) {
    add_step<Rows, V>(b + lane * b_stride, sum, [&](int i) POCKC_LAMBDA { return left[i][lane]; });
  }
  if constexpr (Rest > 0) {
    __asm__("" : "+r"(b));  // load B again: kept in registers, it would drive out sums
    add_lanes<Rest, 0>(a + Rows * a_stride, a_stride, b, b_stride, sum + Rows);
  }
}

// Row-major A: four consecutive steps from one vector of each row.
template <int R, int V>
POCKC_INLINE void add_row_major(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                int64_t depth, vf (*sum)[V]) {
  constexpr int kMost = kVectorRegisters - (R + 1) * V, kRows = kMost < R ? (R + 1) / 2 : R;
  static_assert(kRows <= kMost, "two parts of the rows are enough");
  int64_t k = 0;
  for (; k + W <= depth; k += W, b += W * b_stride) {
    POCKC_UNROLL
    for (int lane = 0; lane < W; ++lane) __builtin_prefetch(b + (kStepsAhead + lane) * b_stride);
    add_lanes<kRows, R - kRows>(a + k, a_stride, b, b_stride, sum);
  }
  for (; k < depth; ++k, b += b_stride) {
    add_step<R, V>(b, sum, [&](int i) POCKC_LAMBDA { return a[i * a_stride + k]; });
  }
}

// Transposed A: the rows of a step are neighbours, in one vector or in two that overlap.
template <int R, int V>
POCKC_INLINE void add_transposed(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                 int64_t depth, vf (*sum)[V]) {
  static_assert(R <= 2 * W, "rows of two vectors");
  for (int64_t k = 0; k < depth; ++k, a += a_stride, b += b_stride) {
    __builtin_prefetch(b + kStepsAhead * b_stride);
    if constexpr (R < W) {
      add_step<R, V>(b, sum, [&](int i) POCKC_LAMBDA { return a[i]; });
    } else {
      const vf first = load(a), second = load(a + R - W);
      add_step<R, V>(b, sum, [&](int i) POCKC_LAMBDA { return i < W ? first[i] : second[i - (R - W)]; });
    }
  }
}

// sum[i][j] over the steps [k0, end) of k, from a and b on, which end up behind them.
template <int R, int V, bool RowMajor>
POCKC_INLINE void add_steps(const float*& a, int64_t a_stride, const float*& b, int64_t b_stride, int64_t k0,
                            int64_t end, vf (&sum)[R][V]) {
  const int64_t depth = end - k0;
  if constexpr (RowMajor) {
    add_row_major<R, V>(a, a_stride, b, b_stride, depth, sum);
  } else {
    add_transposed<R, V>(a, a_stride, b, b_stride, depth, sum);
  }
  a += RowMajor ? depth : depth * a_stride;
  b += depth * b_stride;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_GEMM_LANES_H_
