// softmax, log_softmax and their gradients over the last axis. The output may be the first operand: a row is
// read to its end before it is written.
//   softmax_grad(ct, y) = y * (ct - sum(ct * y))        log_softmax_grad(ct, y) = ct - exp(y) * sum(ct)
#include <cmath>

#include "common.h"

namespace pockc::ref {
namespace {

bool fits(const Call& call, int inputs) {
  if (!has_operands(call, inputs, inputs, 1) || !all_f32(call) || !no_attributes(call)) return false;
  const Tensor& out = call.outputs[0];
  for (int i = 0; i < inputs; ++i) {
    if (!same_shape(call.inputs[i], out)) return false;
  }
  return out.rank >= 1;
}

// Calls body(offset) for the start of each row.
template <typename Body>
Status for_each_row(const Call& call, Body&& body) {
  const int64_t length = last_dim(call.outputs[0]), elements = call.outputs[0].elements();
  for (int64_t at = 0; at < elements; at += length) body(at, length);
  return PK_OK;
}

float maximum_of(const float* x, int64_t length) {
  float highest = x[0];
  for (int64_t i = 1; i < length; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

double sum_of_exponentials(const float* x, int64_t length, float highest) {
  double total = 0.0;
  for (int64_t i = 0; i < length; ++i) total += std::exp(x[i] - highest);
  return total;
}

}  // namespace

Status check_softmax(const Call& call) { return verdict(fits(call, 1)); }

Status run_softmax(const Call& call) {
  return for_each_row(call, [&](int64_t at, int64_t length) {
    const float* x = call.inputs[0].as<float>() + at;
    float* out = call.outputs[0].as<float>() + at;
    const float highest = maximum_of(x, length);
    const double total = sum_of_exponentials(x, length, highest);
    for (int64_t i = 0; i < length; ++i) out[i] = static_cast<float>(std::exp(x[i] - highest) / total);
  });
}

Status check_log_softmax(const Call& call) { return verdict(fits(call, 1)); }

Status run_log_softmax(const Call& call) {
  return for_each_row(call, [&](int64_t at, int64_t length) {
    const float* x = call.inputs[0].as<float>() + at;
    float* out = call.outputs[0].as<float>() + at;
    const float highest = maximum_of(x, length);
    const double logarithm = std::log(sum_of_exponentials(x, length, highest));
    for (int64_t i = 0; i < length; ++i) out[i] = static_cast<float>((x[i] - highest) - logarithm);
  });
}

Status check_softmax_grad(const Call& call) { return verdict(fits(call, 2)); }

Status run_softmax_grad(const Call& call) {
  return for_each_row(call, [&](int64_t at, int64_t length) {
    const float* ct = call.inputs[0].as<float>() + at;
    const float* y = call.inputs[1].as<float>() + at;
    float* out = call.outputs[0].as<float>() + at;
    double product = 0.0;
    for (int64_t i = 0; i < length; ++i) product += static_cast<double>(ct[i]) * y[i];
    for (int64_t i = 0; i < length; ++i) out[i] = static_cast<float>(y[i] * (ct[i] - product));
  });
}

Status check_log_softmax_grad(const Call& call) { return verdict(fits(call, 2)); }

Status run_log_softmax_grad(const Call& call) {
  return for_each_row(call, [&](int64_t at, int64_t length) {
    const float* ct = call.inputs[0].as<float>() + at;
    const float* y = call.inputs[1].as<float>() + at;
    float* out = call.outputs[0].as<float>() + at;
    double total = 0.0;
    for (int64_t i = 0; i < length; ++i) total += ct[i];
    for (int64_t i = 0; i < length; ++i) out[i] = static_cast<float>(ct[i] - std::exp(y[i]) * total);
  });
}

}  // namespace pockc::ref
