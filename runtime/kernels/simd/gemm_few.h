// A product of few rows by a transposed B, such as a linear layer of a small batch: squares of B are
// transposed in registers and used there, because each is used so seldom that writing panels costs more than
// all the rest.
#ifndef POCKC_SIMD_GEMM_FEW_H_
#define POCKC_SIMD_GEMM_FEW_H_

#include "simd/gemm_pack.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

constexpr int kFewRows = 8;

// The columns [n0, n0 + columns) of up to kFewRows rows at `a`, `depth` steps from k0 on: up to W columns.
inline void add_few(const RightMatrix& b, const float* a, int64_t a_stride, int row_count, int64_t n0,
                    int64_t columns, int64_t k0, int64_t depth, vf* sum) {
  const FloatRows rows{b.data, b.stride};
  for (int64_t k = k0; k < k0 + depth; k += W) {
    const int64_t valid = minimum<int64_t>(W, k0 + depth - k);
    vf x[W];
    load_square(rows, n0, k, columns, valid, x);
    for (int m = 0; m < row_count; ++m) {
      const float* left = a + m * a_stride + k;
      vf total = sum[m];
      if (valid == W) {
        POCKC_UNROLL
        for (int i = 0; i < W; ++i) total = fma(splat(left[i]), x[i], total);
      } else {
        for (int i = 0; i < valid; ++i) total = fma(splat(left[i]), x[i], total);
      }
      sum[m] = total;
    }
  }
}

// Whether the product of these rows is better made so.
inline bool is_few(const Gemm& gemm, int64_t rows) {
  return !kHalfProducts && rows <= kFewRows && gemm.b.transposed && gemm.b.data != nullptr &&
         gemm.a.patches == nullptr && !gemm.a.transposed && !is_half(gemm.a.dtype) && !is_half(gemm.c.dtype);
}

// The rows [m0, m1) and columns [n0, n1) of C, up to an epilogue that takes whole rows.
inline void multiply_few(const Gemm& gemm, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const float* a = static_cast<const float*>(gemm.a.data) + m0 * gemm.a.stride;
  const Epilogue& epilogue = gemm.epilogue;
  const int rows = static_cast<int>(m1 - m0);
  for (int64_t n = n0; n < n1; n += W) {
    const int64_t columns = minimum<int64_t>(W, n1 - n);
    for (int64_t k = 0; k < gemm.k; k += kDepth) {
      const int64_t depth = minimum(kDepth, gemm.k - k);
      vf sum[kFewRows] = {};
      add_few(gemm.b, a, gemm.a.stride, rows, n, columns, k, depth, sum);
      const bool last = k + depth == gemm.k;
      for (int m = 0; m < rows; ++m) {
        float* c = output_row(gemm.c, m0 + m) + n - gemm.c.first_column;
        if (k > 0 || gemm.accumulate) sum[m] += load_n(c, columns);
        if (last && epilogue.bias != nullptr) sum[m] += load_n(epilogue.bias + n, columns);
        if (last && epilogue.activation == kClip)
          sum[m] = clip(sum[m], splat(epilogue.low), splat(epilogue.high));
        store_n(c, sum[m], columns);
      }
    }
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_GEMM_FEW_H_
