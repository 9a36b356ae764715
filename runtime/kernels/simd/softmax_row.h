// One row of a softmax, of floats or halves: shared by softmax, the losses and attention.
#ifndef POCKC_SIMD_SOFTMAX_ROW_H_
#define POCKC_SIMD_SOFTMAX_ROW_H_

#include "simd/halves.h"
#include "simd/math.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

template <typename T>
POCKC_INLINE vf load_or(const T* x, int64_t valid, float rest) {
  return valid == W ? load(x) : keep_first(load_partial(x, valid), valid, splat(rest));
}

template <typename T>
POCKC_INLINE float row_max(const T* x, int64_t n) {
  Lanes most = Lanes::all(-kInfinity);
  for_lanes(n, [&](int j, int64_t i, int64_t valid)
                   POCKC_LAMBDA { most.v[j] = larger(load_or(x + i, valid, -kInfinity), most.v[j]); });
  return most.max();
}

// Sum of e^(x - shift); where `y` is given, the terms are stored there (it may be x).
template <typename T>
POCKC_INLINE float row_exponentials(const T* x, int64_t n, float shift, float* y) {
  Lanes sum = Lanes::all(0);
  for_lanes(n, [&](int j, int64_t i, int64_t valid) POCKC_LAMBDA {
    const vf e = exponential_of_negative(load_or(x + i, valid, -kInfinity) - splat(shift));
    if (y != nullptr) store_n(y + i, e, valid);
    sum.v[j] += valid == W ? e : keep_first(e, valid, vf{});
  });
  return sum.sum();
}

POCKC_INLINE float scalar_log(float x) { return logarithm(splat(x))[0]; }

// log sum e^x, x finite or -inf, not all -inf.
POCKC_INLINE float row_log_sum(const float* x, int64_t n) {
  const float shift = row_max(x, n);
  return shift + scalar_log(row_exponentials(x, n, shift, nullptr));
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_SOFTMAX_ROW_H_
