// quantize, dequantize, add_int8: see ref/quantized.cpp. Output element i depends on input element i alone.
#include "simd/codes.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

struct Scale {
  vf scale, zero;
  explicit Scale(Attributes* attributes)
      : scale(splat(attributes->real())), zero(splat(static_cast<float>(attributes->integer()))) {}
  POCKC_INLINE vf numbers(vi codes) const { return (to_float(codes) - zero) * scale; }
};

// f(offset, valid) for all vectors of the output.
template <typename F>
Status for_output(const Call& call, F f) {
  parallel(call, elements(call.outputs[0]), kElementGrain,
           [&](int64_t begin, int64_t end, int) { for_vectors(begin, end, f); });
  return PK_OK;
}

}  // namespace

bool accepts_quantize(const Call&) { return true; }

Status run_quantize(const Call& call) {
  Attributes attributes(call);
  const Scale scale(&attributes);
  const float* x = call.inputs[0].as<float>();
  uint8_t* y = call.outputs[0].as<uint8_t>();
  return for_output(call, [=](int64_t i, int64_t valid) POCKC_LAMBDA {
    const vf steps = load_n(x + i, valid) / scale.scale + scale.zero;
    narrow(y + i, to_codes(steps, vf{}, splat(255.0f)), valid);
  });
}

bool accepts_dequantize(const Call&) { return true; }

Status run_dequantize(const Call& call) {
  Attributes attributes(call);
  const Scale scale(&attributes);
  const uint8_t* x = call.inputs[0].as<uint8_t>();
  float* y = call.outputs[0].as<float>();
  return for_output(call, [=](int64_t i, int64_t valid)
                              POCKC_LAMBDA { store_n(y + i, scale.numbers(widen(x + i, valid)), valid); });
}

bool accepts_add_int8(const Call&) { return true; }

Status run_add_int8(const Call& call) {
  Attributes attributes(call);
  const Scale left(&attributes), right(&attributes);
  const vf zero = splat(static_cast<float>(attributes.integer()));
  const vf low = splat(static_cast<float>(attributes.integer()));
  const vf high = splat(static_cast<float>(attributes.integer()));
  const uint8_t* a = call.inputs[0].as<uint8_t>();
  const uint8_t* b = call.inputs[1].as<uint8_t>();
  uint8_t* y = call.outputs[0].as<uint8_t>();
  return for_output(call, [=](int64_t i, int64_t valid) POCKC_LAMBDA {
    const vf sum = left.numbers(widen(a + i, valid)) + right.numbers(widen(b + i, valid)) + zero;
    narrow(y + i, to_codes(sum, low, high), valid);
  });
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
