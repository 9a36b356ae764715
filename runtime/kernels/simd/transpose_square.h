// A W x W block of floats, transposed in registers.
#ifndef POCKC_SIMD_TRANSPOSE_SQUARE_H_
#define POCKC_SIMD_TRANSPOSE_SQUARE_H_

#include <utility>

#include "simd/simd.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

template <int Step, int... I>
POCKC_INLINE void exchange(vf& a, vf& b, std::integer_sequence<int, I...>) {
  const vf low = __builtin_shufflevector(a, b, ((I & Step) == 0 ? I : I - Step + W)...);
  const vf high = __builtin_shufflevector(a, b, ((I & Step) == 0 ? I + Step : I + W)...);
  a = low;
  b = high;
}
// W x W block: log2(W) rounds, round s exchanges the off-diagonal s x s blocks.
template <int Step>
POCKC_INLINE void transpose_square(vf* x) {
  if constexpr (Step < W) {
    POCKC_UNROLL
    for (int i = 0; i < W; ++i) {
      if ((i & Step) == 0) exchange<Step>(x[i], x[i + Step], std::make_integer_sequence<int, W>());
    }
    transpose_square<2 * Step>(x);
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_TRANSPOSE_SQUARE_H_
