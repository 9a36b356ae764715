// layer_norm and rms_norm over the last axis, and their gradients, which recompute the statistics from x.
//
// With n the row length, m = average(x) (0 for rms_norm), r = 1 / sqrt(average((x - m)^2) + epsilon), z = (x
// - m) * r:
//   layer_norm(x, [gamma, beta]; epsilon) = z * gamma + beta           rms_norm(x, [gamma]; epsilon) = z *
//   gamma
//   ..._grad_gamma(ct, x; epsilon) = sum over rows of ct * z
//   ..._grad_input(ct, x, [gamma]; epsilon): with d = ct * gamma, r * (d - average(d) - z * average(d * z)),
//   where rms_norm, which subtracts no mean, has no average(d).
#include <cmath>

#include "common.h"

namespace pockc::ref {
namespace {

enum class Norm { kLayer, kRms };

struct Row {
  double mean = 0.0;
  double inverse = 0.0;  // r above
  double z(float x) const { return (x - mean) * inverse; }
};

Row statistics(Norm norm, const float* x, int64_t length, double epsilon) {
  Row row;
  const double count = static_cast<double>(length);
  if (norm == Norm::kLayer) {
    for (int64_t i = 0; i < length; ++i) row.mean += x[i];
    row.mean /= count;
  }
  double squares = 0.0;
  for (int64_t i = 0; i < length; ++i) squares += (x[i] - row.mean) * (x[i] - row.mean);
  row.inverse = 1.0 / std::sqrt(squares / count + epsilon);
  return row;
}

// The inputs before `full` have x's shape, the others are as long as its last axis.
bool fits(const Call& call, int full) {
  const Tensor& x = call.inputs[0];
  if (!all_f32(call) || x.rank < 1) return false;
  for (int i = 1; i < call.input_count; ++i) {
    const Tensor& input = call.inputs[i];
    if (i < full ? !same_shape(input, x) : !has_shape(input, {last_dim(x)})) return false;
  }
  Attributes attributes(call);
  attributes.number();
  return attributes.valid();
}

const float* optional_input(const Call& call, int index) {
  return index < call.input_count ? call.inputs[index].as<float>() : nullptr;
}

Status run_forward(Norm norm, const Call& call) {
  const double epsilon = Attributes(call).number();
  const int64_t length = last_dim(call.inputs[0]), rows = call.inputs[0].elements() / length;
  const float* x = call.inputs[0].as<float>();
  const float* gamma = optional_input(call, 1);
  const float* beta = optional_input(call, 2);
  float* y = call.outputs[0].as<float>();
  for (int64_t i = 0; i < rows; ++i, x += length, y += length) {
    const Row row = statistics(norm, x, length, epsilon);
    for (int64_t k = 0; k < length; ++k) {
      const double scaled = gamma != nullptr ? row.z(x[k]) * gamma[k] : row.z(x[k]);
      y[k] = static_cast<float>(beta != nullptr ? scaled + beta[k] : scaled);
    }
  }
  return PK_OK;
}

Status check_grad_input(const Call& call) {
  return verdict(has_operands(call, 2, 3, 1) && fits(call, 2) && same_shape(call.outputs[0], call.inputs[0]));
}

Status run_grad_input(Norm norm, const Call& call) {
  const double epsilon = Attributes(call).number();
  const int64_t length = last_dim(call.inputs[0]), rows = call.inputs[0].elements() / length;
  const float* ct = call.inputs[0].as<float>();
  const float* x = call.inputs[1].as<float>();
  const float* gamma = optional_input(call, 2);
  float* out = call.outputs[0].as<float>();
  const auto scaled = [&](int64_t k) {
    return gamma != nullptr ? static_cast<double>(ct[k]) * gamma[k] : ct[k];
  };
  for (int64_t i = 0; i < rows; ++i, ct += length, x += length, out += length) {
    const Row row = statistics(norm, x, length, epsilon);
    double average = 0.0, product = 0.0;
    for (int64_t k = 0; k < length; ++k) {
      average += scaled(k);
      product += scaled(k) * row.z(x[k]);
    }
    average = norm == Norm::kLayer ? average / static_cast<double>(length) : 0.0;
    product /= static_cast<double>(length);
    for (int64_t k = 0; k < length; ++k) {
      out[k] = static_cast<float>(row.inverse * (scaled(k) - average - row.z(x[k]) * product));
    }
  }
  return PK_OK;
}

Status check_grad_gamma(const Call& call) {
  return verdict(has_operands(call, 2, 2, 1) && fits(call, 2) &&
                 has_shape(call.outputs[0], {last_dim(call.inputs[0])}));
}

constexpr int64_t kChunk = 256;  // elements of gamma whose f64 sums are held at once

Status run_grad_gamma(Norm norm, const Call& call) {
  const double epsilon = Attributes(call).number();
  const int64_t length = last_dim(call.inputs[0]), rows = call.inputs[0].elements() / length;
  const float* ct = call.inputs[0].as<float>();
  const float* x = call.inputs[1].as<float>();
  float* out = call.outputs[0].as<float>();
  for (int64_t first = 0; first < length; first += kChunk) {
    const int64_t end = length - first < kChunk ? length : first + kChunk;
    double sums[kChunk] = {};
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t start = i * length;
      const Row row = statistics(norm, x + start, length, epsilon);
      for (int64_t k = first; k < end; ++k) sums[k - first] += ct[start + k] * row.z(x[start + k]);
    }
    for (int64_t k = first; k < end; ++k) out[k] = static_cast<float>(sums[k - first]);
  }
  return PK_OK;
}

}  // namespace

Status check_layer_norm(const Call& call) {
  return verdict(has_operands(call, 1, 3, 1) && call.input_count != 2 && fits(call, 1) &&
                 same_shape(call.outputs[0], call.inputs[0]));
}
Status run_layer_norm(const Call& call) { return run_forward(Norm::kLayer, call); }
Status check_layer_norm_grad_input(const Call& call) { return check_grad_input(call); }
Status run_layer_norm_grad_input(const Call& call) { return run_grad_input(Norm::kLayer, call); }
Status check_layer_norm_grad_gamma(const Call& call) { return check_grad_gamma(call); }
Status run_layer_norm_grad_gamma(const Call& call) { return run_grad_gamma(Norm::kLayer, call); }

Status check_rms_norm(const Call& call) {
  return verdict(has_operands(call, 1, 2, 1) && fits(call, 1) && same_shape(call.outputs[0], call.inputs[0]));
}
Status run_rms_norm(const Call& call) { return run_forward(Norm::kRms, call); }
Status check_rms_norm_grad_input(const Call& call) { return check_grad_input(call); }
Status run_rms_norm_grad_input(const Call& call) { return run_grad_input(Norm::kRms, call); }
Status check_rms_norm_grad_gamma(const Call& call) { return check_grad_gamma(call); }
Status run_rms_norm_grad_gamma(const Call& call) { return run_grad_gamma(Norm::kRms, call); }

}  // namespace pockc::ref
