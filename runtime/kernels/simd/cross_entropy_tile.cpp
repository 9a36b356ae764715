// cross_entropy_tile and cross_entropy_grad_tile (the maths: see the reference kernels). A row is one
// thread's, and its sums are sixteen lanes': the result does not depend on how rows are split.
#include "simd/cross_entropy.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

constexpr int64_t kStatistics = 5;
enum { kMost, kSum, kLabel, kTotal, kBest };

// The first position of `value`; 0 where it is NaN.
int64_t position_of(float value, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] == value) return i;
  }
  return 0;
}

// Adds a tile of one row to what is known of it.
void add_tile(const float* row, int64_t width, int64_t start, int64_t label, float* known) {
  const float here = row_max(row, width), before = known[kMost];
  const float most = before > here ? before : here;
  const float shift = most == -kInfinity ? 0.0f : most;  // of a row of -inf alone the sum is 0, not NaN
  const float kept = known[kSum] * exponential_of_negative(splat(before - shift))[0];
  known[kSum] = kept + row_exponentials(row, width, shift, nullptr);
  known[kTotal] += row_sum(row, width);
  if (label >= start && label < start + width) known[kLabel] = row[label - start];
  if (here > before) known[kBest] = static_cast<float>(start + position_of(here, row, width));
  known[kMost] = most;
}

}  // namespace

bool accepts_cross_entropy_tile(const Call& call) { return elements(call.inputs[0]) > 0; }

Status run_cross_entropy_tile(const Call& call) {
  const int64_t start = call.ints[0], ignore_index = call.ints[1];
  const int64_t rows = call.inputs[0].dims[0], width = call.inputs[0].dims[1];
  const float* logits = call.inputs[0].as<float>();
  const int64_t* labels = call.inputs[1].as<int64_t>();
  const float* running = call.input_count == 3 ? call.inputs[2].as<float>() : nullptr;
  float* out = call.outputs[0].as<float>();
  parallel(call, rows, row_grain(width), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float known[kStatistics] = {-kInfinity};
      for (int64_t k = 0; running != nullptr && k < kStatistics; ++k) known[k] = running[i * kStatistics + k];
      add_tile(logits + i * width, width, start, labels[i] == ignore_index ? -1 : labels[i], known);
      for (int64_t k = 0; k < kStatistics; ++k) out[i * kStatistics + k] = known[k];
    }
  });
  return PK_OK;
}

bool accepts_cross_entropy_grad_tile(const Call& call) { return elements(call.inputs[1]) > 0; }

Status run_cross_entropy_grad_tile(const Call& call) {
  const int64_t start = call.ints[0], classes = call.ints[1];
  const CrossEntropy loss = {call.ints[2], call.floats[0]};
  const int64_t rows = call.inputs[1].dims[0], width = call.inputs[1].dims[1];
  int64_t counted = 0;
  const Status status = count_rows(call.inputs[2], classes, loss.ignore_index, &counted);
  if (status != PK_OK) return status;
  const float* logits = call.inputs[1].as<float>();
  const int64_t* labels = call.inputs[2].as<int64_t>();
  const float* running = call.inputs[3].as<float>();
  float* out = call.outputs[0].as<float>();
  const float factor = *call.inputs[0].as<float>() / static_cast<float>(counted);
  const float spread = static_cast<float>(loss.smoothing / static_cast<double>(classes));
  const float keep = static_cast<float>(1.0 - loss.smoothing);
  parallel(call, rows, row_grain(width), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = logits + i * width;
      float* to = out + i * width;
      if (labels[i] == loss.ignore_index) {
        for (int64_t c = 0; c < width; ++c) to[c] = 0;
        continue;
      }
      const vf most = splat(running[i * kStatistics + kMost]);
      const vf scale = splat(1.0f / running[i * kStatistics + kSum]);
      for_vectors(0, width, [&](int64_t c, int64_t valid) POCKC_LAMBDA {
        const vf difference =
            fma(exponential_of_negative(load_n(row + c, valid) - most), scale, splat(-spread));
        store_n(to + c, difference * splat(factor), valid);
      });
      const int64_t label = labels[i] - start;
      if (label >= 0 && label < width) to[label] = fma(-factor, keep, to[label]);
    }
  });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
