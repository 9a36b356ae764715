// Unary operators, and gradients of activations (ct times a slope): one pass, output element i depends on
// input element i alone, so the output may be an operand.
#include "simd/attributes.h"
#include "simd/halves.h"
#include "simd/math.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

// Floats, or halves of one dtype.
bool float_call(const Call& call) {
  const Tensor& out = call.outputs[0];
  for (int i = 0; i < call.input_count; ++i) {
    if (call.inputs[i].dtype != out.dtype || !same_shape(call.inputs[i], out)) return false;
  }
  return (is_f32(out) || is_half(out.dtype)) && elements(out) > 0;
}

template <typename T, typename F>
Status map_of(const Call& call, F function) {
  const T* x = call.inputs[0].as<T>();
  T* out = call.outputs[0].as<T>();
  parallel(call, elements(call.outputs[0]), kElementGrain, [=](int64_t begin, int64_t end, int) {
    for_vectors(begin, end, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      store_n(out + i, function(load_n(x + i, valid)), valid);
    });
  });
  return PK_OK;
}

template <typename F>
Status map(const Call& call, F function) {
  return with_elements(call.outputs[0].dtype,
                       [&](auto zero) { return map_of<decltype(zero)>(call, function); });
}

template <typename T, typename F>
Status map_gradient_of(const Call& call, F slope) {
  const T* ct = call.inputs[0].as<T>();
  const T* x = call.inputs[1].as<T>();
  T* out = call.outputs[0].as<T>();
  parallel(call, elements(call.outputs[0]), kElementGrain, [=](int64_t begin, int64_t end, int) {
    for_vectors(begin, end, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      store_n(out + i, load_n(ct + i, valid) * slope(load_n(x + i, valid)), valid);
    });
  });
  return PK_OK;
}

template <typename F>
Status map_gradient(const Call& call, F slope) {
  return with_elements(call.outputs[0].dtype,
                       [&](auto zero) { return map_gradient_of<decltype(zero)>(call, slope); });
}

}  // namespace

#define POCKC_UNARY(op, expression)                                 \
  bool accepts_##op(const Call& call) { return float_call(call); }  \
  Status run_##op(const Call& call) {                               \
    return map(call, [](vf x) POCKC_LAMBDA { return expression; }); \
  }
POCKC_UNARY(neg, -x)
POCKC_UNARY(abs, absolute(x))
POCKC_UNARY(exp, exponential(x))
POCKC_UNARY(log, logarithm(x))
POCKC_UNARY(sqrt, square_root(x))
POCKC_UNARY(rsqrt, splat(1.0f) / square_root(x))
POCKC_UNARY(reciprocal, splat(1.0f) / x)
POCKC_UNARY(tanh, hyperbolic_tangent(x))
POCKC_UNARY(erf, error_function(x))
POCKC_UNARY(sigmoid, sigmoid(x))
POCKC_UNARY(silu, silu(x))
POCKC_UNARY(hardswish, hardswish(x))
POCKC_UNARY(hardsigmoid, hardsigmoid(x))

#define POCKC_GRADIENT(op, slope)                                       \
  bool accepts_##op(const Call& call) { return float_call(call); }      \
  Status run_##op(const Call& call) {                                   \
    return map_gradient(call, [](vf x) POCKC_LAMBDA { return slope; }); \
  }
POCKC_GRADIENT(tanh_grad, fma(-x, x, splat(1.0f)))  // x is the output of tanh
POCKC_GRADIENT(sigmoid_grad, x*(splat(1.0f) - x))   // x is the output of sigmoid
POCKC_GRADIENT(silu_grad, silu_slope(x))
POCKC_GRADIENT(hardswish_grad, hardswish_slope(x))

bool accepts_gelu(const Call& call) { return float_call(call); }
Status run_gelu(const Call& call) {
  if (Attributes(call).boolean()) return map(call, [](vf x) POCKC_LAMBDA { return gelu_tanh(x); });
  return map(call, [](vf x) POCKC_LAMBDA { return gelu(x); });
}

bool accepts_gelu_grad(const Call& call) { return float_call(call); }
Status run_gelu_grad(const Call& call) {
  if (Attributes(call).boolean())
    return map_gradient(call, [](vf x) POCKC_LAMBDA { return gelu_tanh_slope(x); });
  return map_gradient(call, [](vf x) POCKC_LAMBDA { return gelu_slope(x); });
}

bool accepts_clip(const Call& call) { return float_call(call); }
Status run_clip(const Call& call) {
  Attributes attributes(call);
  const vf low = splat(attributes.real()), high = splat(attributes.real());
  return map(call, [=](vf x) POCKC_LAMBDA { return clip(x, low, high); });
}

bool accepts_copy(const Call&) { return true; }
Status run_copy(const Call& call) {
  constexpr int64_t kSizes[] = {4, 8, 4, 1, 1};
  const DType dtype = call.inputs[0].dtype;
  const int64_t size = is_half(dtype) ? 2 : kSizes[static_cast<int>(dtype)];
  const char* from = call.inputs[0].as<char>();
  char* to = call.outputs[0].as<char>();
  if (from == to) return PK_OK;
  parallel(call, elements(call.inputs[0]) * size, 4 * kElementGrain, [&](int64_t begin, int64_t end, int) {
    std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin));
  });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
