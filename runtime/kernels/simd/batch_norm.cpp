// Batch normalisation: channels are the last axis, statistics run over all rows.
//   y = (x - mean) r gamma + beta, r = 1 / sqrt(variance + epsilon), variance biased;   h = (x - mean) r
//   dx = gamma r (ct - mean(ct) - h mean(ct h));   dgamma = sum(ct h)
// Column sums as in columns.h, threads take groups of columns. grad_input keeps mean(ct) and mean(ct h), 2
// [C], in the workspace.
#include "simd/attributes.h"
#include "simd/columns.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

// f(c0, c1) over groups of columns.
template <typename F>
void for_columns(const Call& call, int64_t columns, F&& f) {
  parallel(call, divide_up(columns, kColumnGroup), 1, [&](int64_t begin, int64_t end, int) {
    f(begin * kColumnGroup, minimum(columns, end * kColumnGroup));
  });
}

void divide_columns(float* sums, int64_t c0, int64_t c1, float divisor) {
  for_vectors(c0, c1, [&](int64_t c, int64_t valid) POCKC_LAMBDA {
    store_n(sums + c, load_n(sums + c, valid) / splat(divisor), valid);
  });
}

POCKC_INLINE vf inverse_deviation(const float* variance, int64_t valid, float epsilon) {
  return splat(1.0f) / square_root(load_n(variance, valid) + splat(epsilon));
}

// f(row offset, column, valid) over all elements, by rows.
template <typename F>
void for_elements(const Call& call, int64_t rows, int64_t channels, F&& f) {
  parallel(call, rows, maximum<int64_t>(1, kElementGrain / channels), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      for_vectors(0, channels, [&](int64_t c, int64_t valid) POCKC_LAMBDA { f(row * channels, c, valid); });
    }
  });
}

bool accepts(const Call& call) { return is_f32(call.inputs[0]) && elements(call.inputs[0]) > 0; }

}  // namespace

bool accepts_batch_norm(const Call& call) { return accepts(call); }

Status run_batch_norm(const Call& call) {
  const float* x = call.inputs[0].as<float>();
  const float* gamma = call.inputs[1].as<float>();
  const float* beta = call.inputs[2].as<float>();
  float* y = call.outputs[0].as<float>();
  float* mean = call.outputs[1].as<float>();
  float* variance = call.outputs[2].as<float>();
  const int64_t channels = last_dim(call.inputs[0]), rows = elements(call.inputs[0]) / channels;
  const float epsilon = static_cast<float>(call.floats[0]);
  for_columns(call, channels, [&](int64_t c0, int64_t c1) {
    sum_columns(rows, c0, c1, mean, [&](int64_t row, int64_t c, int64_t valid, vf sum) POCKC_LAMBDA {
      return sum + load_n(x + row * channels + c, valid);
    });
    divide_columns(mean, c0, c1, static_cast<float>(rows));
    sum_columns(rows, c0, c1, variance, [&](int64_t row, int64_t c, int64_t valid, vf sum) POCKC_LAMBDA {
      const vf d = load_n(x + row * channels + c, valid) - load_n(mean + c, valid);
      return fma(d, d, sum);
    });
    divide_columns(variance, c0, c1, static_cast<float>(rows));
  });
  for_elements(call, rows, channels, [&](int64_t row, int64_t c, int64_t valid) POCKC_LAMBDA {
    const vf scale = inverse_deviation(variance + c, valid, epsilon) * load_n(gamma + c, valid);
    const vf d = load_n(x + row + c, valid) - load_n(mean + c, valid);
    store_n(y + row + c, fma(d, scale, load_n(beta + c, valid)), valid);
  });
  return PK_OK;
}

bool accepts_batch_norm_grad_gamma(const Call& call) { return accepts(call); }

Status run_batch_norm_grad_gamma(const Call& call) {
  const float* ct = call.inputs[0].as<float>();
  const float* x = call.inputs[1].as<float>();
  const float* mean = call.inputs[2].as<float>();
  const float* variance = call.inputs[3].as<float>();
  float* out = call.outputs[0].as<float>();
  const int64_t channels = last_dim(call.inputs[0]), rows = elements(call.inputs[0]) / channels;
  const float epsilon = static_cast<float>(call.floats[0]);
  for_columns(call, channels, [&](int64_t c0, int64_t c1) {
    sum_columns(rows, c0, c1, out, [&](int64_t row, int64_t c, int64_t valid, vf sum) POCKC_LAMBDA {
      const int64_t at = row * channels + c;
      return fma(load_n(ct + at, valid), load_n(x + at, valid) - load_n(mean + c, valid), sum);
    });
    for_vectors(c0, c1, [&](int64_t c, int64_t valid) POCKC_LAMBDA {
      store_n(out + c, load_n(out + c, valid) * inverse_deviation(variance + c, valid, epsilon), valid);
    });
  });
  return PK_OK;
}

bool accepts_batch_norm_grad_input(const Call& call) {
  return accepts(call) && has_workspace(call, 0, 2 * round_up(last_dim(call.inputs[0]), 16));
}

Status run_batch_norm_grad_input(const Call& call) {
  const float* ct = call.inputs[0].as<float>();
  const float* x = call.inputs[1].as<float>();
  const float* gamma = call.inputs[2].as<float>();
  const float* mean = call.inputs[3].as<float>();
  const float* variance = call.inputs[4].as<float>();
  float* dx = call.outputs[0].as<float>();
  const int64_t channels = last_dim(call.inputs[0]), rows = elements(call.inputs[0]) / channels;
  const float epsilon = static_cast<float>(call.floats[0]);
  float* ct_mean = workspace(call);
  float* product_mean = ct_mean + round_up(channels, 16);  // of ct (x - mean): r is applied once, below
  for_columns(call, channels, [&](int64_t c0, int64_t c1) {
    sum_columns(rows, c0, c1, ct_mean, [&](int64_t row, int64_t c, int64_t valid, vf sum) POCKC_LAMBDA {
      return sum + load_n(ct + row * channels + c, valid);
    });
    sum_columns(rows, c0, c1, product_mean, [&](int64_t row, int64_t c, int64_t valid, vf sum) POCKC_LAMBDA {
      const int64_t at = row * channels + c;
      return fma(load_n(ct + at, valid), load_n(x + at, valid) - load_n(mean + c, valid), sum);
    });
    divide_columns(ct_mean, c0, c1, static_cast<float>(rows));
    divide_columns(product_mean, c0, c1, static_cast<float>(rows));
  });
  for_elements(call, rows, channels, [&](int64_t row, int64_t c, int64_t valid) POCKC_LAMBDA {
    const vf scale = inverse_deviation(variance + c, valid, epsilon);
    const vf d = load_n(x + row + c, valid) - load_n(mean + c, valid);
    const vf slope = -load_n(product_mean + c, valid) * scale * scale;
    const vf centred = fma(d, slope, load_n(ct + row + c, valid) - load_n(ct_mean + c, valid));
    store_n(dx + row + c, centred * scale * load_n(gamma + c, valid), valid);
  });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
