// Shared by cross entropy over whole rows of logits and over tiles of the classes.
#ifndef POCKC_SIMD_CROSS_ENTROPY_H_
#define POCKC_SIMD_CROSS_ENTROPY_H_

#include "simd/attributes.h"
#include "simd/softmax_row.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

struct CrossEntropy {
  int64_t ignore_index;
  double smoothing;
};

// The rows that count; fails where a label is no class.
inline Status count_rows(const Tensor& labels, int64_t classes, int64_t ignore_index, int64_t* counted) {
  *counted = 0;
  for (int64_t i = 0; i < labels.dims[0]; ++i) {
    const int64_t label = labels.as<int64_t>()[i];
    if (label == ignore_index) continue;
    if (label < 0 || label >= classes) {
      return fail(PK_INVALID_ARGUMENT, "label %lld at position %lld is not one of %lld classes",
                  static_cast<long long>(label), static_cast<long long>(i), static_cast<long long>(classes));
    }
    ++*counted;
  }
  return PK_OK;
}

template <typename T>
POCKC_INLINE float row_sum(const T* x, int64_t n) {
  Lanes sum = Lanes::all(0);
  for_lanes(n, [&](int j, int64_t i, int64_t valid) POCKC_LAMBDA { sum.v[j] += load_n(x + i, valid); });
  return sum.sum();
}

inline int64_t row_grain(int64_t classes) { return maximum<int64_t>(1, kElementGrain / 4 / classes); }

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_CROSS_ENTROPY_H_
