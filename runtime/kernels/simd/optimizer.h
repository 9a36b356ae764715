// What the parameter updates share.
#ifndef POCKC_SIMD_OPTIMIZER_H_
#define POCKC_SIMD_OPTIMIZER_H_

#include "simd/attributes.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

// Positions of p along an axis; fails where one is outside of it.
inline Status require_indices(const Tensor& indices, int64_t length) {
  const int32_t* values = indices.as<int32_t>();
  for (int64_t k = 0; k < indices.dims[0]; ++k) {
    if (values[k] >= 0 && values[k] < length) continue;
    return fail(PK_INVALID_ARGUMENT, "index %lld is outside of the range 0 to %lld",
                static_cast<long long>(values[k]), static_cast<long long>(length - 1));
  }
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_OPTIMIZER_H_
