// softmax, log_softmax and their gradients over the last axis; row by row, so the output may be the first
// operand.
//   softmax_grad: y (ct - sum(ct y))      log_softmax_grad: ct - e^y sum(ct)
#include "simd/attributes.h"
#include "simd/softmax_row.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

bool accepts(const Call& call) { return is_f32(call.inputs[0]) && elements(call.inputs[0]) > 0; }

// f(row offset, length)
template <typename F>
Status for_rows(const Call& call, F&& f) {
  const int64_t n = last_dim(call.inputs[0]);
  parallel(call, elements(call.inputs[0]) / n, maximum<int64_t>(1, kElementGrain / 4 / n),
           [&](int64_t begin, int64_t end, int) {
             for (int64_t row = begin; row < end; ++row) f(row * n, n);
           });
  return PK_OK;
}

}  // namespace

bool accepts_softmax(const Call& call) { return accepts(call); }
Status run_softmax(const Call& call) {
  return for_rows(call, [&](int64_t at, int64_t n) {
    const float* x = call.inputs[0].as<float>() + at;
    float* y = call.outputs[0].as<float>() + at;
    const vf scale = splat(1.0f / row_exponentials(x, n, row_max(x, n), y));
    for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      store_n(y + i, load_n(y + i, valid) * scale, valid);
    });
  });
}

bool accepts_log_softmax(const Call& call) { return accepts(call); }
Status run_log_softmax(const Call& call) {
  return for_rows(call, [&](int64_t at, int64_t n) {
    const float* x = call.inputs[0].as<float>() + at;
    float* y = call.outputs[0].as<float>() + at;
    const float shift = row_max(x, n);
    const vf log_sum = splat(scalar_log(row_exponentials(x, n, shift, nullptr)));
    for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      store_n(y + i, load_n(x + i, valid) - splat(shift) - log_sum, valid);
    });
  });
}

bool accepts_softmax_grad(const Call& call) { return accepts(call); }
Status run_softmax_grad(const Call& call) {
  return for_rows(call, [&](int64_t at, int64_t n) {
    const float* ct = call.inputs[0].as<float>() + at;
    const float* y = call.inputs[1].as<float>() + at;
    float* out = call.outputs[0].as<float>() + at;
    Lanes sum = Lanes::all(0);
    for_lanes(n, [&](int j, int64_t i, int64_t valid)
                     POCKC_LAMBDA { sum.v[j] = fma(load_n(ct + i, valid), load_n(y + i, valid), sum.v[j]); });
    const vf total = splat(sum.sum());
    for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      store_n(out + i, load_n(y + i, valid) * (load_n(ct + i, valid) - total), valid);
    });
  });
}

bool accepts_log_softmax_grad(const Call& call) { return accepts(call); }
Status run_log_softmax_grad(const Call& call) {
  return for_rows(call, [&](int64_t at, int64_t n) {
    const float* ct = call.inputs[0].as<float>() + at;
    const float* y = call.inputs[1].as<float>() + at;
    float* out = call.outputs[0].as<float>() + at;
    Lanes sum = Lanes::all(0);
    for_lanes(n, [&](int j, int64_t i, int64_t valid) POCKC_LAMBDA { sum.v[j] += load_n(ct + i, valid); });
    const vf total = splat(-sum.sum());
    for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      store_n(out + i, fma(exponential_of_negative(load_n(y + i, valid)), total, load_n(ct + i, valid)),
              valid);
    });
  });
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
