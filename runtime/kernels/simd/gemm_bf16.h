// The sums of a tile from panels of bfloat16, for x86 with AVX512_BF16: two products a lane and instruction.
//
// Steps of k go in pairs: the two elements of a row of A lie side by side, and so do those of a column of B.
// A row-major A has them so; panels that are packed row by row are paired afterwards (pair_rows). Where the
// depth is odd, the last step is one of floats.
//
// Error. A product of two such numbers is a float, exactly, and every sum is a float: so it is that of a
// product of floats, K 2^-24 sum |a b|, if a and b are what they are. An operand of floats is rounded before,
// which adds 2^-9 sum |a b|. Subnormal numbers count as zeros here, and become zeros.
#ifndef POCKC_SIMD_GEMM_BF16_H_
#define POCKC_SIMD_GEMM_BF16_H_

#include "simd/halves.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

constexpr int64_t kPairsAhead = 12;  // by then a line of B has come from the second-level cache

POCKC_INLINE __m512bh load_pairs(const B16* p) {
  __m512bh pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  return pairs;
}

// The two elements at p in every lane.
POCKC_INLINE __m512bh splat_pair(const B16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

// Rows 2 i and 2 i + 1 of a panel of W or 2 W columns become pairs, in the order of the columns. A last row
// without a partner stays.
inline void pair_rows(B16* panel, int64_t depth, int64_t width) {
  alignas(64) uint16_t from[4 * W];  // which element of both rows each place takes
  for (int64_t i = 0; i < 2 * width; ++i) from[i] = static_cast<uint16_t>(i % 2 * width + i / 2);
  const __m512i low = _mm512_load_si512(from);
  if (width == W) {
    for (; depth >= 2; depth -= 2, panel += 2 * W) {
      _mm512_storeu_si512(panel, _mm512_permutexvar_epi16(low, _mm512_loadu_si512(panel)));
    }
    return;
  }
  const __m512i high = _mm512_load_si512(from + width);
  for (; depth >= 2; depth -= 2, panel += 4 * W) {
    const __m512i even = _mm512_loadu_si512(panel), odd = _mm512_loadu_si512(panel + 2 * W);
    _mm512_storeu_si512(panel, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_storeu_si512(panel + 2 * W, _mm512_permutex2var_epi16(even, high, odd));
  }
}

// sum[i][j], over `depth` steps of k, of R rows and V vectors. A is row-major, a_stride elements from row to
// row; or a panel of pairs, a_stride from step to step.
template <int R, int V, bool RowMajor>
POCKC_INLINE void multiply_pairs(const B16* a, int64_t a_stride, const B16* b, int64_t depth, vf (*sum)[V]) {
  const int64_t row = RowMajor ? a_stride : 2, step = RowMajor ? 2 : 2 * a_stride;
  POCKC_UNROLL
  for (int i = 0; i < R; ++i) {
    POCKC_UNROLL
    for (int j = 0; j < V; ++j) sum[i][j] = vf{};
  }
  for (; depth >= 2; depth -= 2, a += step, b += 2 * V * W) {
    __m512bh right[V];
    POCKC_UNROLL
    for (int j = 0; j < V; ++j) {
      __builtin_prefetch(b + (kPairsAhead * V + j) * 2 * W);
      right[j] = load_pairs(b + j * 2 * W);
    }
    POCKC_UNROLL
    for (int i = 0; i < R; ++i) {
      const __m512bh left = splat_pair(a + i * row);
      POCKC_UNROLL
      for (int j = 0; j < V; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
  if (depth == 0) return;
  POCKC_UNROLL
  for (int i = 0; i < R; ++i) {
    const vf left = splat(widened(a[RowMajor ? i * row : i]));
    POCKC_UNROLL
    for (int j = 0; j < V; ++j) sum[i][j] = fma(left, load(b + j * W), sum[i][j]);
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_GEMM_BF16_H_
