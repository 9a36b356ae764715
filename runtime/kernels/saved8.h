// The packed form of activations that wait for the backward pass: see ref/saved8.cpp.
#ifndef POCKC_KERNELS_SAVED8_H_
#define POCKC_KERNELS_SAVED8_H_

#include <cstdint>

namespace pockc {

constexpr int64_t kSavedBlock = 128;  // elements that share a scale
constexpr int64_t kScaleBytes = 4;
constexpr float kSavedZero = 128.0f;  // the code of 0
constexpr float kLargestSaved = 127.0f;

// Without linkage, because these are compiled for several instruction sets: see simd/simd.h.
static inline __attribute__((always_inline)) int64_t saved_blocks(int64_t columns) {
  return (columns + kSavedBlock - 1) / kSavedBlock;
}

// Of a row with that many elements.
static inline __attribute__((always_inline)) int64_t packed_bytes(int64_t columns) {
  return kScaleBytes * saved_blocks(columns) + (columns + 3) / 4 * 4;
}

}  // namespace pockc

#endif  // POCKC_KERNELS_SAVED8_H_
