// Elementwise ops of one operand. The output may be the operand itself.
#include <cmath>

#include "activation.h"

namespace pockc::ref {
namespace {

bool keeps_type(const Call& call) {
  return has_operands(call, 1, 1, 1) && same_type(call.inputs[0], call.outputs[0]);
}

template <typename T, typename F>
Status apply(const Call& call, F f) {
  const T* x = call.inputs[0].as<T>();
  T* out = call.outputs[0].as<T>();
  const int64_t elements = call.outputs[0].elements();
  for (int64_t i = 0; i < elements; ++i) out[i] = f(x[i]);
  return PK_OK;
}

int64_t negated(int64_t x) {
  return static_cast<int64_t>(-static_cast<uint64_t>(x));
}  // wraps, as numpy does

Status check_signed(const Call& call) {
  if (!keeps_type(call) || !no_attributes(call)) return PK_BAD_FILE;
  return verdict(is_f32(call.inputs[0]) || call.inputs[0].dtype == DType::kI64);
}

}  // namespace

#define POCKC_UNARY(op, expression)                                                    \
  Status check_##op(const Call& call) {                                                \
    return verdict(keeps_type(call) && is_f32(call.inputs[0]) && no_attributes(call)); \
  }                                                                                    \
  Status run_##op(const Call& call) {                                                  \
    return apply<float>(call, [](float x) { return expression; });                     \
  }
POCKC_UNARY(sign, x != x ? x : static_cast<float>((x > 0.0f) - (x < 0.0f)))
POCKC_UNARY(exp, std::exp(x))
POCKC_UNARY(log, std::log(x))
POCKC_UNARY(sqrt, std::sqrt(x))
POCKC_UNARY(rsqrt, 1.0f / std::sqrt(x))
POCKC_UNARY(reciprocal, 1.0f / x)
POCKC_UNARY(sin, std::sin(x))
POCKC_UNARY(cos, std::cos(x))
POCKC_UNARY(tanh, std::tanh(x))
POCKC_UNARY(sigmoid, sigmoid(x))
POCKC_UNARY(erf, std::erf(x))
// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|): the exponential never overflows.
POCKC_UNARY(softplus, (x < 0.0f ? 0.0f : x) + std::log1p(std::exp(-std::fabs(x))))
POCKC_UNARY(floor, std::floor(x))
POCKC_UNARY(silu, silu(x))
POCKC_UNARY(hardswish, hardswish(x))
POCKC_UNARY(hardsigmoid, hardsigmoid(x))

Status check_neg(const Call& call) { return check_signed(call); }

Status run_neg(const Call& call) {
  if (!is_f32(call.inputs[0])) return apply<int64_t>(call, negated);
  return apply<float>(call, [](float x) { return -x; });
}

Status check_abs(const Call& call) { return check_signed(call); }

Status run_abs(const Call& call) {
  if (!is_f32(call.inputs[0])) return apply<int64_t>(call, [](int64_t x) { return x < 0 ? negated(x) : x; });
  return apply<float>(call, [](float x) { return std::fabs(x); });
}

Status check_logical_not(const Call& call) {
  return verdict(keeps_type(call) && call.inputs[0].dtype == DType::kBool && no_attributes(call));
}

Status run_logical_not(const Call& call) {
  return apply<uint8_t>(call, [](uint8_t x) { return static_cast<uint8_t>(x == 0); });
}

// gelu(x; approximate): by erf, or by tanh when approximate.
Status check_gelu(const Call& call) {
  if (!keeps_type(call) || !is_f32(call.inputs[0])) return PK_BAD_FILE;
  Attributes attributes(call);
  attributes.boolean();
  return verdict(attributes.valid());
}

Status run_gelu(const Call& call) {
  const bool approximate = Attributes(call).boolean();
  return apply<float>(call, approximate ? gelu_tanh : gelu);
}

// Ops with one float attribute, called `parameter` here.
#define POCKC_UNARY_PARAMETER(op, expression)                               \
  Status check_##op(const Call& call) {                                     \
    if (!keeps_type(call) || !is_f32(call.inputs[0])) return PK_BAD_FILE;   \
    Attributes attributes(call);                                            \
    attributes.number();                                                    \
    return verdict(attributes.valid());                                     \
  }                                                                         \
  Status run_##op(const Call& call) {                                       \
    const float parameter = Attributes(call).number_f32();                  \
    return apply<float>(call, [parameter](float x) { return expression; }); \
  }
POCKC_UNARY_PARAMETER(leaky_relu, x > 0.0f ? x : parameter * x)
POCKC_UNARY_PARAMETER(elu, x > 0.0f ? x : parameter * std::expm1(x))
POCKC_UNARY_PARAMETER(pow_scalar, std::pow(x, parameter))

// clip(x; low, high, inclusive): `inclusive` matters to the gradient alone.
Status check_clip(const Call& call) {
  if (!keeps_type(call) || !is_f32(call.inputs[0])) return PK_BAD_FILE;
  Attributes attributes(call);
  attributes.number();
  attributes.number();
  attributes.boolean();
  return verdict(attributes.valid());
}

Status run_clip(const Call& call) {
  Attributes attributes(call);
  const float low = attributes.number_f32();
  const float high = attributes.number_f32();
  return apply<float>(call, [=](float x) { return clip(x, low, high); });
}

}  // namespace pockc::ref
