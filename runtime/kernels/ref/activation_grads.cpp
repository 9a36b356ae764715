// Gradients of activations: ct times the derivative at x, or expressed by the output y. The output may be ct
// itself.
#include <cmath>

#include "activation.h"

namespace pockc::ref {
namespace {

constexpr float kInverseSqrt2Pi = 0.39894228040143268f;

bool fits(const Call& call) {
  return has_operands(call, 2, 2, 1) && all_f32(call) && same_shape(call.inputs[0], call.inputs[1]) &&
         same_shape(call.inputs[0], call.outputs[0]);
}

template <typename F>
Status apply(const Call& call, F derivative) {
  const float* ct = call.inputs[0].as<float>();
  const float* x = call.inputs[1].as<float>();
  float* out = call.outputs[0].as<float>();
  const int64_t elements = call.outputs[0].elements();
  for (int64_t i = 0; i < elements; ++i) out[i] = ct[i] * derivative(x[i]);
  return PK_OK;
}

// d/dx x F(x) = F(x) + x f(x), with F the normal distribution and f its density.
float gelu_derivative(float x) {
  const float distribution = 0.5f * (1.0f + std::erf(x * kInverseSqrt2));
  return distribution + x * kInverseSqrt2Pi * std::exp(-0.5f * x * x);
}

float gelu_tanh_derivative(float x) {
  const float t = std::tanh(kSqrt2OverPi * (x + kGeluCubic * x * x * x));
  const float inner = kSqrt2OverPi * (1.0f + 3.0f * kGeluCubic * x * x);
  return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner;
}

float silu_derivative(float x) {
  const float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

float hardswish_derivative(float x) { return x < -3.0f ? 0.0f : x <= 3.0f ? x / 3.0f + 0.5f : 1.0f; }

}  // namespace

#define POCKC_GRADIENT(op, expression)                                                       \
  Status check_##op(const Call& call) { return verdict(fits(call) && no_attributes(call)); } \
  Status run_##op(const Call& call) {                                                        \
    return apply(call, [](float x) { return expression; });                                  \
  }
POCKC_GRADIENT(tanh_grad, 1.0f - x * x)       // x is the output y
POCKC_GRADIENT(sigmoid_grad, x * (1.0f - x))  // x is the output y
POCKC_GRADIENT(silu_grad, silu_derivative(x))
POCKC_GRADIENT(hardswish_grad, hardswish_derivative(x))
POCKC_GRADIENT(hardsigmoid_grad, x > -3.0f && x < 3.0f ? 1.0f / 6.0f : 0.0f)

// Gradients with one float attribute, called `parameter` here.
#define POCKC_GRADIENT_PARAMETER(op, expression)                     \
  Status check_##op(const Call& call) {                              \
    if (!fits(call)) return PK_BAD_FILE;                             \
    Attributes attributes(call);                                     \
    attributes.number();                                             \
    return verdict(attributes.valid());                              \
  }                                                                  \
  Status run_##op(const Call& call) {                                \
    const float parameter = Attributes(call).number_f32();           \
    return apply(call, [parameter](float x) { return expression; }); \
  }
POCKC_GRADIENT_PARAMETER(leaky_relu_grad, x > 0.0f ? 1.0f : parameter)
POCKC_GRADIENT_PARAMETER(elu_grad, x > 0.0f ? 1.0f : parameter * std::exp(x))

Status check_gelu_grad(const Call& call) {
  if (!fits(call)) return PK_BAD_FILE;
  Attributes attributes(call);
  attributes.boolean();
  return verdict(attributes.valid());
}

Status run_gelu_grad(const Call& call) {
  const bool approximate = Attributes(call).boolean();
  return apply(call, approximate ? gelu_tanh_derivative : gelu_derivative);
}

}  // namespace pockc::ref
