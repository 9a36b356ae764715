// Exponential, logarithm, tanh, erf and the activation functions, from our own polynomials: the same bits on
// every instruction set with fused multiply-add. The errors given below are bounds on what was measured
// against double precision over about a million sampled floats per function, not proofs;
// tests/native/test_math.py samples again. Coefficients are weighted minimax fits.
#ifndef POCKC_SIMD_MATH_H_
#define POCKC_SIMD_MATH_H_

#include "simd/simd.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

constexpr float kInfinity = __builtin_inff();

// e^r for |r| <= ln(2)/2: 1 + r + r^2 p(r).
POCKC_INLINE vf exponential_of_small(vf r) {
  vf p = splat(1.9917970348615198e-04f);
  p = fma(p, r, splat(1.394619001075625e-03f));
  p = fma(p, r, splat(8.333264850080013e-03f));
  p = fma(p, r, splat(4.166626930236816e-02f));
  p = fma(p, r, splat(1.666666716337204e-01f));
  p = fma(p, r, splat(0.5f));
  return fma(p, r * r, r) + splat(1.0f);
}
// x = n ln 2 + r, n the nearest integer: adding 1.5 * 2^23 pushes the fraction out of the mantissa.
struct Exponential {
  vi count;     // n + kCountOffset
  vf fraction;  // e^r

  explicit POCKC_INLINE Exponential(vf x) {
    const vf pushed = x * splat(1.44269504088896f) + splat(12582912.0f);
    const vf n = pushed - splat(12582912.0f);
    vf r = fma(n, splat(-0.693145751953125f), x);  // ln 2 in two parts: the first has 9 zero bits at its end
    r = fma(n, splat(-1.42860682030941e-06f), r);
    count = bits_of(pushed);
    fraction = exponential_of_small(r);
  }
};
constexpr int32_t kCountOffset = 0x4b400000;  // the bits of 1.5 * 2^23

// 2^n for -126 <= n <= 127; 0 for -127. Unsigned: of a NaN, n is any number, and nothing may overflow.
POCKC_INLINE vf power_of_two(vi n) {
  const vu biased = reinterpret_cast<vu>(n) + reinterpret_cast<vu>(splat_int(127));
  return float_of_bits(reinterpret_cast<vi>(biased << 23));
}

// Below the smallest denormal 0, above the largest float inf. Error <= 1 ulp (0.9 in the normal range).
POCKC_INLINE vf exponential(vf x) {
  const Exponential e(clip(x, splat(-105.0f), splat(89.5f)));
  const vi n = e.count - splat_int(kCountOffset);
  // In two steps, so that both factors are normal floats also where the result is not.
  const vi half = n >> 1;
  return e.fraction * power_of_two(half) * power_of_two(n - half);
}

// The same for x <= 0 (up to 88), but 0 where the result is below 2^-126.
POCKC_INLINE vf exponential_of_negative(vf x) {
  const Exponential e(x < splat(-88.0f) ? splat(-88.0f) : x);
  return e.fraction * power_of_two(e.count);  // the shift drops the offset
}

// log x = e ln 2 + log1p(f), x = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt 2); log1p(f) = f - f^2/2 + f^3 p(f).
// Error <= 1 ulp. log 0 = -inf, of a negative number NaN.
POCKC_INLINE vf logarithm(vf x) {
  const vi tiny = x < splat(1.17549435e-38f);
  const vf scaled = select(tiny, x * splat(8388608.0f), x);
  const vi exponent = (bits_of(scaled) - splat_int(0x3f3504f3)) >> 23;
  vf e = __builtin_convertvector(exponent, vf);
  const vf f = float_of_bits(bits_of(scaled) - (exponent << 23)) - splat(1.0f);
  e = e - select(tiny, splat(23.0f), splat(0.0f));
  vf p = splat(6.915368139743805e-02f);
  p = fma(p, f, splat(-1.1789807677268982e-01f));
  p = fma(p, f, splat(1.1872976273298264e-01f));
  p = fma(p, f, splat(-1.238434836268425e-01f));
  p = fma(p, f, splat(1.4218658208847046e-01f));
  p = fma(p, f, splat(-1.6669251024723053e-01f));
  p = fma(p, f, splat(2.0002226531505585e-01f));
  p = fma(p, f, splat(-2.4999986588954926e-01f));
  p = fma(p, f, splat(3.333331048488617e-01f));
  const vf square = f * f;
  vf low = fma(p * f, square, e * splat(1.42860682030941e-06f));
  low = fma(square, splat(-0.5f), low);
  vf y = fma(e, splat(0.693145751953125f), f + low);
  y = select(x == splat(kInfinity), x, y);
  y = select(x == splat(0.0f), splat(-kInfinity), y);
  return select((x < splat(0.0f)) | (x != x), splat(__builtin_nanf("")), y);
}

// |x| < 0.625: x + x^3 p(x^2). Else 1 - 2 / (e^{2|x|} + 1) with the sign of x. Error <= 2 ulp.
POCKC_INLINE vf hyperbolic_tangent(vf x) {
  const vf magnitude = absolute(x);
  const vf s = x * x;
  vf p = splat(2.1475369576364756e-03f);
  p = fma(p, s, splat(-8.182673715054989e-03f));
  p = fma(p, s, splat(2.1702967584133148e-02f));
  p = fma(p, s, splat(-5.394720286130905e-02f));
  p = fma(p, s, splat(1.3333210349082947e-01f));
  p = fma(p, s, splat(-3.333333134651184e-01f));
  const vf small = fma(p * s, x, x);
  const vf large = splat(1.0f) - splat(2.0f) / (exponential(magnitude + magnitude) + splat(1.0f));
  const vi sign = bits_of(x) & splat_int(INT32_MIN);
  return select(magnitude < splat(0.625f), small, float_of_bits(bits_of(large) | sign));
}

// |x| < 0.92: x + x p(x^2). Else 1 - e^{t (q(t) - 1)}, t = min(|x|, 4), with the sign of x. Error <= 2 ulp.
POCKC_INLINE vf error_function(vf x) {
  const vf s = x * x;
  vf p = splat(8.409920701524243e-05f);
  p = fma(p, s, splat(-8.152627851814032e-04f));
  p = fma(p, s, splat(5.201960448175669e-03f));
  p = fma(p, s, splat(-2.6859799399971962e-02f));
  p = fma(p, s, splat(1.1283703148365021e-01f));
  p = fma(p, s, splat(-3.7612634897232056e-01f));
  p = fma(p, s, splat(1.2837916612625122e-01f));
  const vf small = fma(p, x, x);
  const vf magnitude = absolute(x);
  const vf t = magnitude > splat(4.0f) ? splat(4.0f) : magnitude;
  vf q = splat(-1.1522463864821475e-05f);
  q = fma(q, t, splat(3.2565437140874565e-04f));
  q = fma(q, t, splat(-3.6537705454975367e-03f));
  q = fma(q, t, splat(2.3785360157489777e-02f));
  q = fma(q, t, splat(-1.062631607055664e-01f));
  q = fma(q, t, splat(-6.351358890533447e-01f));
  q = fma(q, t, splat(-1.286521703004837e-01f));
  const vf large = splat(1.0f) - exponential_of_negative(fma(q, t, -t));
  const vi sign = bits_of(x) & splat_int(INT32_MIN);
  return select(magnitude < splat(0.92f), small, float_of_bits(bits_of(large) | sign));
}

POCKC_INLINE vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }

constexpr float kInverseRootTwoPi = 0.39894228040143268f;  // 1 / sqrt(2 pi)
constexpr float kRootTwoOverPi = 0.79788456080286536f;     // sqrt(2 / pi)
constexpr float kTanhCubic = 0.044715f;

// Phi(-a) / e^{-a^2/2} = 1/2 - a p(a), a = min(|x|, 5), with Phi the normal distribution.
POCKC_INLINE vf normal_tail(vf a) {
  vf p = splat(-3.7624773e-08f);
  p = fma(p, a, splat(1.1347669e-06f));
  p = fma(p, a, splat(-1.5405283e-05f));
  p = fma(p, a, splat(1.2577554e-04f));
  p = fma(p, a, splat(-7.005546e-04f));
  p = fma(p, a, splat(2.8887556e-03f));
  p = fma(p, a, splat(-9.434377e-03f));
  p = fma(p, a, splat(2.5877083e-02f));
  p = fma(p, a, splat(-6.2164348e-02f));
  p = fma(p, a, splat(1.3288976e-01f));
  p = fma(p, a, splat(-2.4998783e-01f));
  p = fma(p, a, splat(3.9894173e-01f));
  return fma(-a, p, splat(0.5f));
}
POCKC_INLINE vf normal_bell(vf x) { return exponential_of_negative(x * x * splat(-0.5f)); }
POCKC_INLINE vf least_of(vf x, float most) { return x > splat(most) ? splat(most) : x; }

// x Phi(x) = max(x, 0) - |x| Phi(-|x|). Error <= 3.5 ulp for x > -1, and <= 1e-7 below.
POCKC_INLINE vf gelu(vf x) {
  const vf a = least_of(absolute(x), 5.0f);
  return fma(-a, normal_bell(x) * normal_tail(a), larger(x, vf{}));
}
POCKC_INLINE vf gelu_tanh_argument(vf x) {
  return splat(kRootTwoOverPi) * fma(x * splat(kTanhCubic), x * x, x);
}
POCKC_INLINE vf gelu_tanh(vf x) {
  const vf half = x * splat(0.5f);
  return fma(half, hyperbolic_tangent(gelu_tanh_argument(x)), half);
}
POCKC_INLINE vf silu(vf x) { return x / (splat(1.0f) + exponential(-x)); }
POCKC_INLINE vf hardsigmoid(vf x) {
  return clip(x + splat(3.0f), splat(0.0f), splat(6.0f)) * splat(1.0f / 6.0f);
}
POCKC_INLINE vf hardswish(vf x) {
  return x * clip(x + splat(3.0f), splat(0.0f), splat(6.0f)) * splat(1.0f / 6.0f);
}

// Phi(x) + x phi(x), phi the density: with d = Phi(-|x|) - |x| phi(x) it is d for x <= 0, and 1 - d above.
// Error <= 2e-7.
POCKC_INLINE vf gelu_slope(vf x) {
  const vf a = least_of(absolute(x), 5.0f);
  const vf d = normal_bell(x) * fma(-a, splat(kInverseRootTwoPi), normal_tail(a));
  return select(x > vf{}, splat(1.0f) - d, d);
}
// With u the argument of the tanh, t = tanh u: (1 + t) / 2 + x (1 - t^2) u' / 2
POCKC_INLINE vf gelu_tanh_slope(vf x) {
  const vf t = hyperbolic_tangent(gelu_tanh_argument(x));
  const vf slope = splat(kRootTwoOverPi) * fma(splat(3.0f * kTanhCubic) * x, x, splat(1.0f));
  const vf steep = fma(-t, t, splat(1.0f)) * slope;
  return splat(0.5f) * fma(x, steep, splat(1.0f) + t);
}
// s (1 + x (1 - s))
POCKC_INLINE vf silu_slope(vf x) {
  const vf s = sigmoid(x);
  return s * fma(x, splat(1.0f) - s, splat(1.0f));
}
POCKC_INLINE vf hardswish_slope(vf x) {
  const vf middle = fma(x, splat(1.0f / 3.0f), splat(0.5f));
  const vf y = select(x > splat(3.0f), splat(1.0f), middle);
  return select(x < splat(-3.0f), splat(0.0f), y);
}

// The epilogue of a matrix product or convolution: the values are the op table's ENUM.
enum Activation : int64_t { kNone = 0, kClip = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4, kHardswish = 5 };

// x[0, n) through a transcendental activation, in place.
inline void activate(float* x, int64_t n, Activation activation) {
  const auto apply = [&](auto&& function) {
    for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      store_n(x + i, function(load_n(x + i, valid)), valid);
    });
  };
  if (activation == kGelu) apply([](vf v) POCKC_LAMBDA { return gelu(v); });
  if (activation == kGeluTanh) apply([](vf v) POCKC_LAMBDA { return gelu_tanh(v); });
  if (activation == kSilu) apply([](vf v) POCKC_LAMBDA { return silu(v); });
  if (activation == kHardswish) apply([](vf v) POCKC_LAMBDA { return hardswish(v); });
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_MATH_H_
