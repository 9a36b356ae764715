// The transforms of Winograd's convolution F(n x n, 3 x 3), on one vector of channels at a time.
//
// A tile of n x n outputs comes from s x s inputs, s = n + 2:
//   y = At [ (G w Gt) * (Bt x B) ] A
// with * element by element: s^2 multiplications instead of 9 n^2, one for each of the s^2 places of a tile.
// Each transform is applied along the rows of a tile, then along its columns. The matrices are those of the
// interpolation points 0, 1, -1 and infinity (n = 2) and 0, a, -a, b, -b and infinity (n = 4), a = sqrt(1/2),
// b = sqrt(2).
//
// Error, measured with inputs behind a ReLU and 64 to 512 channels, root mean square of the error over that
// of the result: 2e-7 for the plain sum, 2e-7 to 4e-7 for n = 2, 7e-7 to 1.2e-6 for n = 4, which would
// be 1.4e-6 to 2.4e-6 with the more usual points 1, -1, 2, -2. tests/native/test_winograd.py holds them.
// Operations and their order are the same for every instruction set.
#ifndef POCKC_SIMD_WINOGRAD_H_
#define POCKC_SIMD_WINOGRAD_H_

#include "simd/simd.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

constexpr int kTaps = 3;

template <int Outputs>
struct Winograd;

template <>
struct Winograd<2> {
  // Bt = [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1]
  static POCKC_INLINE void input(const vf* x, vf* v) {
    v[0] = x[0] - x[2];
    v[1] = x[1] + x[2];
    v[2] = x[2] - x[1];
    v[3] = x[1] - x[3];
  }
  // G = [1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1]
  static POCKC_INLINE void weight(const vf* w, vf* u) {
    const vf half = splat(0.5f), ends = (w[0] + w[2]) * half, middle = w[1] * half;
    u[0] = w[0];
    u[1] = ends + middle;
    u[2] = ends - middle;
    u[3] = w[2];
  }
  // At = [1 1 1 0; 0 1 -1 -1]
  static POCKC_INLINE void output(const vf* m, vf* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
};

// With a = sqrt(1/2) and b = sqrt(2): a a = 1/2, b b = 2, a b = 1.
template <>
struct Winograd<4> {
  static constexpr float kNear = 0.70710678118654752f, kFar = 1.41421356237309505f;

  // Bt = [1 0 -5/2 0 1 0; 0 -2a -2 a 1 0; 0 2a -2 -a 1 0; 0 -b/2 -1/2 b 1 0; 0 b/2 -1/2 -b 1 0;
  //       0 1 0 -5/2 0 1]
  static POCKC_INLINE void input(const vf* x, vf* v) {
    const vf two = splat(2), half = splat(0.5f), ends = splat(2.5f);
    const vf near_even = fma(-two, x[2], x[4]), near_odd = splat(kNear) * fma(-two, x[1], x[3]);
    const vf far_even = fma(-half, x[2], x[4]), far_odd = splat(kFar) * fma(-half, x[1], x[3]);
    v[0] = fma(-ends, x[2], x[0] + x[4]);
    v[1] = near_even + near_odd;
    v[2] = near_even - near_odd;
    v[3] = far_even + far_odd;
    v[4] = far_even - far_odd;
    v[5] = fma(-ends, x[3], x[1] + x[5]);
  }
  // G = [1 0 0; -2/3 -2a/3 -1/3; -2/3 2a/3 -1/3; 1/6 b/6 1/3; 1/6 -b/6 1/3; 0 0 1]
  static POCKC_INLINE void weight(const vf* w, vf* u) {
    const vf third = splat(1.0f / 3), sixth = splat(1.0f / 6);
    const vf near_even = -third * fma(splat(2), w[0], w[2]), near_odd = splat(-2 * kNear / 3) * w[1];
    const vf far_even = sixth * fma(splat(2), w[2], w[0]), far_odd = splat(kFar / 6) * w[1];
    u[0] = w[0];
    u[1] = near_even + near_odd;
    u[2] = near_even - near_odd;
    u[3] = far_even + far_odd;
    u[4] = far_even - far_odd;
    u[5] = w[2];
  }
  // At = [1 1 1 1 1 0; 0 a -a b -b 0; 0 1/2 1/2 2 2 0; 0 a/2 -a/2 2b -2b 1]
  static POCKC_INLINE void output(const vf* m, vf* y) {
    const vf near_even = m[1] + m[2], near_odd = splat(kNear) * (m[1] - m[2]);
    const vf far_even = m[3] + m[4], far_odd = splat(kFar) * (m[3] - m[4]);
    y[0] = m[0] + near_even + far_even;
    y[1] = near_odd + far_odd;
    y[2] = fma(splat(0.5f), near_even, splat(2) * far_even);
    y[3] = fma(splat(0.5f), near_odd, fma(splat(2), far_odd, m[5]));
  }
};

// [In][In] to [Out][Out] by `along`, which maps In vectors to Out: along rows, then along columns.
template <int In, int Out, typename Along>
POCKC_INLINE void transform_square(const vf* from, vf* to, Along&& along) {
  vf rows[In * Out];
  POCKC_UNROLL
  for (int i = 0; i < In; ++i) along(from + i * In, rows + i * Out);
  POCKC_UNROLL
  for (int j = 0; j < Out; ++j) {
    vf column[In], result[Out];
    POCKC_UNROLL
    for (int i = 0; i < In; ++i) column[i] = rows[i * Out + j];
    along(column, result);
    POCKC_UNROLL
    for (int i = 0; i < Out; ++i) to[i * Out + j] = result[i];
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_WINOGRAD_H_
