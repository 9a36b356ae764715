// The sums of a tile from panels of halves, for 64-bit ARM with arithmetic of 16-bit floats: eight products
// an instruction instead of four.
//
// Partial sums of kHalfTerms products are held in 16 bits, and added to sums in 32.
//
// Error. With u = 2^-11, the unit roundoff of f16, and n = kHalfTerms: a step s <- fl(s + a b) is a fused
// multiply-add, which rounds once, by at most u |s + a b|, or 2^-25 where that is below the normal numbers.
// After n steps from zero, whatever the signs,
//   |s - sum a b| <= g sum |a b| + n 2^-25 (1 + g),   g = n u / (1 - n u),
// that is g = 1.6e-2 for n = 32. The K / n parts of a sum of K terms are added in 32 bits, which adds (K / n)
// 2^-24 sum |a b| at most: a hundredth of g for K = 80000. So the bound of a whole product is
//   g sum |a b| + K 2^-25,
// and hardly grows with its depth. Roundings of both signs mostly cancel: of random numbers the root mean
// square of the error is below 2 u times the root of sum (a b)^2. A B of floats is rounded before, which adds
// u (1 + g) sum |a b|. Nothing of that holds where a partial sum exceeds 65504: it becomes infinite, and so
// does the result.
#ifndef POCKC_SIMD_GEMM_HALF_H_
#define POCKC_SIMD_GEMM_HALF_H_

#include "simd/halves.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

constexpr int kHalfLanes = 8;
constexpr int kHalfTerms = 32;  // part of the result's definition, as kDepth, which it divides
constexpr int kHalfLine = 32;   // of a cache line
constexpr int kHalfStepsAhead = 16;

typedef float16x8_t vf16;

POCKC_INLINE vf16 load_halves(const F16* p) { return vreinterpretq_f16_u16(vld1q_u16(&p->bits)); }
POCKC_INLINE float16_t number(const F16& x) {
  float16_t number;
  std::memcpy(&number, &x, sizeof(number));
  return number;
}

// A step of k: part[i][h] += the factor of row i * a vector of B.
template <int R, int H, typename Factor>
POCKC_INLINE void add_products(const F16* b, vf16 (*part)[H], Factor&& factor) {
  vf16 right[H];
  POCKC_UNROLL
  for (int h = 0; h < H; ++h) right[h] = load_halves(b + h * kHalfLanes);
  POCKC_UNROLL
  for (int i = 0; i < R; ++i) {
    POCKC_UNROLL
    for (int h = 0; h < H; ++h) part[i][h] = vfmaq_n_f16(part[i][h], right[h], factor(i));
  }
}

// `terms` steps of a row-major A: eight of them from one vector of each row.
template <int R, int H>
POCKC_INLINE void add_row_major(const F16* a, int64_t a_stride, const F16* b, int64_t terms,
                                vf16 (*part)[H]) {
  constexpr int64_t kWidth = H * kHalfLanes;
  int64_t k = 0;
  for (; k + kHalfLanes <= terms; k += kHalfLanes, b += kHalfLanes * kWidth) {
    vf16 left[R];
    POCKC_UNROLL
    for (int i = 0; i < R; ++i) left[i] = load_halves(a + i * a_stride + k);
    POCKC_UNROLL
    for (int lane = 0; lane < kHalfLanes; ++lane) {
      if (lane * kWidth % kHalfLine == 0) __builtin_prefetch(b + (kHalfStepsAhead + lane) * kWidth);
      add_products<R, H>(b + lane * kWidth, part, [&](int i) POCKC_LAMBDA { return left[i][lane]; });
    }
  }
  for (; k < terms; ++k, b += kWidth) {
    add_products<R, H>(b, part, [&](int i) POCKC_LAMBDA { return number(a[i * a_stride + k]); });
  }
}

// The same of a transposed A, always copied: a step's rows are one vector.
template <int R, int H>
POCKC_INLINE void add_transposed(const F16* a, const F16* b, int64_t terms, vf16 (*part)[H]) {
  static_assert(R <= kHalfLanes, "rows of a panel");
  constexpr int64_t kWidth = H * kHalfLanes;
  for (int64_t k = 0; k < terms; ++k, a += kHalfLanes, b += kWidth) {
    __builtin_prefetch(b + kHalfStepsAhead * kWidth);
    const vf16 left = load_halves(a);
    add_products<R, H>(b, part, [&](int i) POCKC_LAMBDA { return left[i]; });
  }
}

// sum[i][j], over `depth` steps of k, of R rows and V vectors of floats, with a panel of B as wide as these.
template <int R, int V, bool RowMajor>
POCKC_INLINE void multiply_halves(const F16* a, int64_t a_stride, const F16* b, int64_t depth, vf (*sum)[V]) {
  constexpr int H = (V + 1) / 2;
  for (int64_t k = 0; k == 0 || k < depth; k += kHalfTerms) {  // once at least: the sum of no steps is zero
    const int64_t terms = minimum<int64_t>(kHalfTerms, depth - k);
    vf16 part[R][H];
    POCKC_UNROLL
    for (int i = 0; i < R; ++i) {
      POCKC_UNROLL
      for (int h = 0; h < H; ++h) part[i][h] = vdupq_n_f16(0);
    }
    const F16* right = b + k * H * kHalfLanes;
    if (RowMajor) {
      add_row_major<R, H>(a + k, a_stride, right, terms, part);
    } else {
      add_transposed<R, H>(a + k * kHalfLanes, right, terms, part);
    }
    const auto widened = [&](int i, int j) POCKC_LAMBDA {
      return j % 2 == 0 ? vcvt_f32_f16(vget_low_f16(part[i][j / 2])) : vcvt_high_f32_f16(part[i][j / 2]);
    };
    const auto set = [&](auto sum_of) POCKC_LAMBDA {
      POCKC_UNROLL
      for (int i = 0; i < R; ++i) {
        POCKC_UNROLL
        for (int j = 0; j < V; ++j) sum[i][j] = sum_of(i, j);
      }
    };
    if (k == 0) {
      set(widened);
    } else {
      set([&](int i, int j) POCKC_LAMBDA { return sum[i][j] + widened(i, j); });
    }
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_GEMM_HALF_H_
