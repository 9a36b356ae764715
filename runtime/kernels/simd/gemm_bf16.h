// The sums of a tile from panels of bfloat16, for x86 with AVX512_BF16: two products a lane and instruction.
//
// Steps of k go in pairs: the two elements of a row of A lie side by side, and so do those of a column of B.
// A row-major A and a transposed B have them so; of others two rows are packed at a time. Where the depth is
// odd, the last step is one of floats.
//
// Error. A product of two such numbers is a float, exactly, and every sum is a float: so it is that of a
// product of floats, K 2^-24 sum |a b|, if a and b are what they are. An operand of floats is rounded before,
// which adds 2^-9 sum |a b|. Subnormal numbers count as zeros here, and become zeros.
#ifndef POCKC_SIMD_GEMM_BF16_H_
#define POCKC_SIMD_GEMM_BF16_H_

#include "simd/gemm_ahead.h"
#include "simd/halves.h"
#include "simd/transpose_square.h"

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

// Two rows of W elements, one after the other, as pairs.
POCKC_INLINE __m512i as_pairs(__m512i rows) {
  alignas(64) static constexpr uint16_t kOrder[2 * W] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                         21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                         11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), rows);
}
POCKC_INLINE void store_pairs(B16* to, __m512i rows) { _mm512_storeu_si512(to, as_pairs(rows)); }
// Both in one vector, one after the other.
POCKC_INLINE __m512i both(vf first, vf second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}
POCKC_INLINE void store_pairs(B16* to, vf even, vf odd) { store_pairs(to, both(even, odd)); }
POCKC_INLINE __m512i both(const B16* first, const B16* second) {
  const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
  return _mm512_maskz_inserti64x4(0xff, low, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)), 1);
}
template <typename T>
POCKC_INLINE __m512i both(const T* first, const T* second) {
  return both(load(first), load(second));
}
template <typename T>
POCKC_INLINE void copy_pairs(B16* to, const T* even, const T* odd) {
  store_pairs(to, both(even, odd));
}

// W columns from `column` on of a panel of `width`, from rows of B transposed: element k0 + k of row n0 + n.
// A vector of pairs is moved as one of floats is.
template <typename Rows>
void pack_transposed_pairs(const Rows& rows, int64_t n0, int64_t k0, int64_t depth, int64_t columns,
                           B16* panel, int64_t width, int64_t column) {
  for (int64_t k = 0; k < depth; k += 2 * W) {
    const int64_t valid = minimum<int64_t>(2 * W, depth - k), low = minimum<int64_t>(valid, W);
    vf x[W];
    POCKC_UNROLL
    for (int i = 0; i < W; ++i) {
      x[i] = vf{};
      if (i >= columns) continue;
      const vf high = valid > W ? rows.load(n0 + i, k0 + k + W, valid - W) : vf{};
      x[i] = reinterpret_cast<vf>(both(rows.load(n0 + i, k0 + k, low), high));
    }
    POCKC_UNROLL
    for (int i = 0; i < W; ++i) {
      rows.ask(n0 + W + i, k0 + k);
      rows.ask(n0 + W + i, k0 + k + W);
    }
    transpose_square<1>(x);
    B16* line = panel + k * width + 2 * column;
    for (int64_t i = 0; i < valid / 2; ++i, line += 2 * width) std::memcpy(line, &x[i], sizeof(vf));
    if (valid % 2 == 0) continue;  // a last step alone
    const __m256i last = _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(x[valid / 2]));
    std::memcpy(line - column, &last, sizeof(last));
  }
}

// sum[i][j], over `depth` steps of k, of R rows and V vectors. A is row-major, a_stride elements from row to
// row; or a panel of pairs, a_stride from step to step. ask(left) is called every kAheadSteps steps, with
// those that are left.
template <int R, int V, bool RowMajor, typename Ask>
POCKC_INLINE void multiply_pairs(const B16* a, int64_t a_stride, const B16* b, int64_t depth, vf (*sum)[V],
                                 const Ask& ask) {
  const int64_t row = RowMajor ? a_stride : 2, step = RowMajor ? 2 : 2 * a_stride;
  POCKC_UNROLL
  for (int i = 0; i < R; ++i) {
    POCKC_UNROLL
    for (int j = 0; j < V; ++j) sum[i][j] = vf{};
  }
  while (depth >= 2) {
    ask(depth);
    const int64_t end = depth > kAheadSteps ? depth - kAheadSteps : depth % 2;
    for (; depth > end; depth -= 2, a += step, b += 2 * V * W) {
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
