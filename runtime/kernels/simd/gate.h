// What decides which elements of a gradient pass an activation: the activation's result, or a bit for each of
// its elements, as range_mask makes them.
#ifndef POCKC_SIMD_GATE_H_
#define POCKC_SIMD_GATE_H_

#include "simd/attributes.h"
#include "simd/bits.h"
#include "simd/math.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

struct Gate {
  const float* gradient = nullptr;  // the first element of the tensor that is gated
  const float* values = nullptr;    // of the activation, in the same order; null: bits
  const uint8_t* bits = nullptr;
  float low = 0, high = 0;
  bool inclusive = false;

  void read_attributes(Attributes* attributes) {
    low = attributes->real(), high = attributes->real();
    inclusive = attributes->boolean();
  }
};

// The lanes of elements that lie between the bounds, of which an infinite one always holds.
template <bool Inclusive>
POCKC_INLINE vi in_range(vf x, const Gate& gate) {
  const vi any_low = splat_int(gate.low == -kInfinity ? -1 : 0);
  const vi any_high = splat_int(gate.high == kInfinity ? -1 : 0);
  const vf low = splat(gate.low), high = splat(gate.high);
  return (any_low | (Inclusive ? x >= low : x > low)) & (any_high | (Inclusive ? x <= high : x < high));
}

// The bits of up to W elements, from any one on.
POCKC_INLINE uint32_t bits_from(const uint8_t* mask, int64_t element, int64_t count) {
  const int64_t first = element / 8, last = (element + count - 1) / 8;
  uint32_t bits = 0;
  for (int64_t byte = first; byte <= last; ++byte) {
    bits |= static_cast<uint32_t>(mask[byte]) << (8 * (byte - first));
  }
  return bits >> (element % 8);
}

// `count` elements of x, whose first one has the bit `first`.
POCKC_INLINE void close_by_bits(const uint8_t* mask, int64_t first, float* x, int64_t count) {
  int64_t i = 0;
  if (first % 8 == 0) {
    for (; i + 16 <= count; i += 16) {
      const uint8_t* bytes = mask + (first + i) / 8;
      const uint32_t bits = bytes[0] | static_cast<uint32_t>(bytes[1]) << 8;
      POCKC_UNROLL
      for (int j = 0; j < 16; j += W) store(x + i + j, select(lanes_of_bits(bits, j), load(x + i + j), vf{}));
    }
  }
  for_vectors(i, count, [&](int64_t at, int64_t valid) POCKC_LAMBDA {
    const vi passes = lanes_of_bits(bits_from(mask, first + at, valid));
    store_n(x + at, select(passes, load_n(x + at, valid), vf{}), valid);
  });
}

template <bool Inclusive>
void close_by_values(const Gate& shared, const float* values, float* x, int64_t count) {
  const Gate gate = shared;  // what it holds stays in registers: a float that is written could be its bounds
  for_vectors(0, count, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
    const vi passes = in_range<Inclusive>(load_n(values + i, valid), gate);
    store_n(x + i, select(passes, load_n(x + i, valid), vf{}), valid);
  });
}

// `count` elements of the gradient, from x on: those that do not pass become zero.
inline void close_gate(const Gate& gate, float* x, int64_t count) {
  const int64_t first = x - gate.gradient;
  if (gate.values == nullptr) {
    close_by_bits(gate.bits, first, x, count);
    return;
  }
  const auto close = gate.inclusive ? close_by_values<true> : close_by_values<false>;
  close(gate, gate.values + first, x, count);
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_GATE_H_
