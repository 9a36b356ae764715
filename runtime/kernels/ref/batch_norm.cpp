// batch_norm(x, gamma, beta; epsilon) -> (y, mean, variance): channels are the last axis, statistics over all
// others, the variance is biased. With r = 1 / sqrt(variance + epsilon) and z = (x - mean) * r:
//   y = gamma * z + beta
//   batch_norm_grad_gamma(ct, x, mean, variance; epsilon) = sum(ct * z)
//   batch_norm_grad_input(ct, x, gamma, mean, variance; epsilon) = gamma * r * (ct - average(ct) - z *
//   average(ct * z))
#include <cmath>

#include "common.h"

namespace pockc::ref {
namespace {

constexpr int64_t kChunk = 64;  // channels whose f64 sums are held at once

// Operands 0 to `full` - 1 and `out` have the shape of x, the other inputs are vectors of channels.
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

struct Sums {
  double values[kChunk] = {};
};

// Sums term(row * channels + channel, channel) over the rows, for up to kChunk channels from `first`.
template <typename Term>
Sums sum_rows(int64_t rows, int64_t channels, int64_t first, int64_t count, Term&& term) {
  Sums sums;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < count; ++j) sums.values[j] += term(row * channels + first + j, j);
  }
  return sums;
}

int64_t chunk_at(int64_t first, int64_t channels) {
  return channels - first < kChunk ? channels - first : kChunk;
}

double inverse_deviation(double variance, double epsilon) { return 1.0 / std::sqrt(variance + epsilon); }

}  // namespace

Status check_batch_norm(const Call& call) {
  if (!has_operands(call, 3, 3, 3) || !fits(call, 1)) return PK_BAD_FILE;
  return verdict(same_shape(call.outputs[0], call.inputs[0]) && same_shape(call.outputs[1], call.inputs[1]) &&
                 same_shape(call.outputs[2], call.inputs[1]));
}

Status run_batch_norm(const Call& call) {
  const double epsilon = Attributes(call).number();
  const int64_t channels = last_dim(call.inputs[0]), rows = call.inputs[0].elements() / channels;
  const double count = static_cast<double>(rows);
  const float* x = call.inputs[0].as<float>();
  const float* gamma = call.inputs[1].as<float>();
  const float* beta = call.inputs[2].as<float>();
  float* y = call.outputs[0].as<float>();
  float* out_mean = call.outputs[1].as<float>();
  float* out_variance = call.outputs[2].as<float>();
  for (int64_t first = 0; first < channels; first += kChunk) {
    const int64_t chunk = chunk_at(first, channels);
    Sums mean = sum_rows(rows, channels, first, chunk, [&](int64_t at, int64_t) { return x[at]; });
    for (double& value : mean.values) value /= count;
    Sums variance = sum_rows(rows, channels, first, chunk, [&](int64_t at, int64_t j) {
      const double difference = x[at] - mean.values[j];
      return difference * difference;
    });
    Sums factor;
    for (int64_t j = 0; j < chunk; ++j) {
      variance.values[j] /= count;
      factor.values[j] = gamma[first + j] * inverse_deviation(variance.values[j], epsilon);
      out_mean[first + j] = static_cast<float>(mean.values[j]);
      out_variance[first + j] = static_cast<float>(variance.values[j]);
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < chunk; ++j) {
        const int64_t at = row * channels + first + j;
        y[at] = static_cast<float>((x[at] - mean.values[j]) * factor.values[j] + beta[first + j]);
      }
    }
  }
  return PK_OK;
}

Status check_batch_norm_grad_input(const Call& call) {
  return verdict(has_operands(call, 5, 5, 1) && fits(call, 2) && same_shape(call.outputs[0], call.inputs[0]));
}

Status run_batch_norm_grad_input(const Call& call) {
  const double epsilon = Attributes(call).number();
  const int64_t channels = last_dim(call.inputs[0]), rows = call.inputs[0].elements() / channels;
  const double count = static_cast<double>(rows);
  const float* ct = call.inputs[0].as<float>();
  const float* x = call.inputs[1].as<float>();
  const float* gamma = call.inputs[2].as<float>();
  const float* mean = call.inputs[3].as<float>();
  const float* variance = call.inputs[4].as<float>();
  float* out = call.outputs[0].as<float>();
  for (int64_t first = 0; first < channels; first += kChunk) {
    const int64_t chunk = chunk_at(first, channels);
    const Sums total = sum_rows(rows, channels, first, chunk, [&](int64_t at, int64_t) { return ct[at]; });
    const Sums product = sum_rows(rows, channels, first, chunk, [&](int64_t at, int64_t j) {
      return ct[at] * (static_cast<double>(x[at]) - mean[first + j]);
    });
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < chunk; ++j) {
        const int64_t at = row * channels + first + j;
        const double r = inverse_deviation(variance[first + j], epsilon);
        const double z = (static_cast<double>(x[at]) - mean[first + j]) * r;
        const double centred = ct[at] - total.values[j] / count - z * (product.values[j] * r / count);
        out[at] = static_cast<float>(gamma[first + j] * r * centred);
      }
    }
  }
  return PK_OK;
}

Status check_batch_norm_grad_gamma(const Call& call) {
  return verdict(has_operands(call, 4, 4, 1) && fits(call, 2) && same_shape(call.outputs[0], call.inputs[2]));
}

Status run_batch_norm_grad_gamma(const Call& call) {
  const double epsilon = Attributes(call).number();
  const int64_t channels = last_dim(call.inputs[0]), rows = call.inputs[0].elements() / channels;
  const float* ct = call.inputs[0].as<float>();
  const float* x = call.inputs[1].as<float>();
  const float* mean = call.inputs[2].as<float>();
  const float* variance = call.inputs[3].as<float>();
  float* out = call.outputs[0].as<float>();
  for (int64_t first = 0; first < channels; first += kChunk) {
    const int64_t chunk = chunk_at(first, channels);
    const Sums product = sum_rows(rows, channels, first, chunk, [&](int64_t at, int64_t j) {
      return ct[at] * (static_cast<double>(x[at]) - mean[first + j]);
    });
    for (int64_t j = 0; j < chunk; ++j) {
      out[first + j] =
          static_cast<float>(product.values[j] * inverse_deviation(variance[first + j], epsilon));
    }
  }
  return PK_OK;
}

}  // namespace pockc::ref
