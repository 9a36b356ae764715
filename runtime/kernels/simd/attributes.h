// Reads a call's attributes in the op table's order.
#ifndef POCKC_SIMD_ATTRIBUTES_H_
#define POCKC_SIMD_ATTRIBUTES_H_

#include "simd/simd.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

class Attributes {
 public:
  explicit Attributes(const Call& call) : ints_(call.ints), floats_(call.floats) {}

  int64_t integer() { return *ints_++; }
  bool boolean() { return *ints_++ != 0; }
  float real() { return static_cast<float>(*floats_++); }
  // A tuple of a known length, which precedes its elements.
  void tuple(int64_t* to, int length) {
    ++ints_;
    for (int i = 0; i < length; ++i) to[i] = *ints_++;
  }

 private:
  const int64_t* ints_;
  const double* floats_;
};

inline float* workspace(const Call& call) { return static_cast<float*>(call.workspace); }
inline bool has_workspace(const Call& call, int64_t floats_per_thread, int64_t floats_shared = 0) {
  const int64_t floats = floats_per_thread * thread_count(call) + floats_shared;
  return call.workspace_bytes >= static_cast<size_t>(floats) * sizeof(float);
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_ATTRIBUTES_H_
