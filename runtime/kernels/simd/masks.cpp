// range_mask and apply_mask: sixteen elements, two mask bytes at a time. Work is split at multiples of
// sixteen, so that no two threads write one byte.
#include "simd/attributes.h"
#include "simd/bits.h"
#include "simd/halves.h"
#include "simd/math.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

// Calls f(first element, valid <= 16): of all but the last sixteen with a constant, which it is compiled for.
template <typename F>
void for_sixteens(const Call& call, int64_t count, const F& function) {
  parallel(call, divide_up(count, 16), kElementGrain / 16, [&](int64_t begin, int64_t end, int) {
    const F f = function;  // what it holds stays in registers: a byte that is written could be anything else
    const int64_t whole = minimum(end, count / 16);
    for (int64_t block = begin; block < whole; ++block) f(block * 16, static_cast<int64_t>(16));
    if (whole < end) f(whole * 16, count - whole * 16);
  });
}

template <bool Inclusive, typename T>
Status range_mask(const Call& call, float low, float high) {
  const vi any_low = splat_int(low == -kInfinity ? -1 : 0), any_high = splat_int(high == kInfinity ? -1 : 0);
  const T* x = call.inputs[0].as<T>();
  uint8_t* mask = call.outputs[0].as<uint8_t>();
  for_sixteens(call, elements(call.inputs[0]), [=](int64_t first, int64_t count) POCKC_LAMBDA {
    uint32_t bits = 0;
    for_vectors(0, count, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      const vf v = load_n(x + first + i, valid);
      const vi above = any_low | (Inclusive ? v >= splat(low) : v > splat(low));
      const vi below = any_high | (Inclusive ? v <= splat(high) : v < splat(high));
      bits |= bits_of_lanes(above & below) << i;
    });
    bits &= (1u << count) - 1;
    mask[first / 8] = static_cast<uint8_t>(bits);
    if (count > 8) mask[first / 8 + 1] = static_cast<uint8_t>(bits >> 8);
  });
  return PK_OK;
}

template <typename T>
Status apply_mask(const Call& call) {
  const vf scale = splat(Attributes(call).real());
  const T* x = call.inputs[0].as<T>();
  const uint8_t* mask = call.inputs[1].as<uint8_t>();
  T* out = call.outputs[0].as<T>();
  for_sixteens(call, elements(call.outputs[0]), [=](int64_t first, int64_t count) POCKC_LAMBDA {
    uint32_t bits = mask[first / 8];
    if (count > 8) bits |= static_cast<uint32_t>(mask[first / 8 + 1]) << 8;
    for_vectors(0, count, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      const vf y = load_n(x + first + i, valid) * scale;
      store_n(out + first + i, select(lanes_of_bits(bits, i), y, vf{}), valid);
    });
  });
  return PK_OK;
}

}  // namespace

bool accepts_range_mask(const Call& call) { return elements(call.inputs[0]) > 0; }

Status run_range_mask(const Call& call) {
  Attributes attributes(call);
  const float low = attributes.real(), high = attributes.real();
  const bool inclusive = attributes.boolean();
  return with_elements(call.inputs[0].dtype, [&](auto zero) {
    using T = decltype(zero);
    return inclusive ? range_mask<true, T>(call, low, high) : range_mask<false, T>(call, low, high);
  });
}

bool accepts_apply_mask(const Call& call) {
  return call.inputs[0].dtype == call.outputs[0].dtype && elements(call.inputs[0]) > 0;
}

Status run_apply_mask(const Call& call) {
  return with_elements(call.inputs[0].dtype, [&](auto zero) { return apply_mask<decltype(zero)>(call); });
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
