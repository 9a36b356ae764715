// cross_entropy_tile and cross_entropy_grad_tile (the maths: see the reference kernels). A row is one
// thread's, and its sums are sixteen lanes': the result does not depend on how rows are split.
#include "simd/cross_entropy.h"
#include "simd/patches.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

constexpr int64_t kStatistics = 5;
enum { kMost, kSum, kLabel, kTotal, kBest };

float value_of(float x) { return x; }
template <typename Half>
float value_of(Half x) {
  return widened(x);
}

// The first position of `value`; 0 where it is NaN.
template <typename T>
int64_t position_of(float value, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (value_of(x[i]) == value) return i;
  }
  return 0;
}

// Adds a tile of one row to what is known of it.
template <typename T>
void add_tile(const T* row, int64_t width, int64_t start, int64_t label, float* known) {
  const float here = row_max(row, width), before = known[kMost];
  const float most = before > here ? before : here;
  const float shift = most == -kInfinity ? 0.0f : most;  // of a row of -inf alone the sum is 0, not NaN
  const float kept = known[kSum] * exponential_of_negative(splat(before - shift))[0];
  known[kSum] = kept + row_exponentials(row, width, shift, nullptr);
  known[kTotal] += row_sum(row, width);
  if (label >= start && label < start + width) known[kLabel] = value_of(row[label - start]);
  if (here > before) known[kBest] = static_cast<float>(start + position_of(here, row, width));
  known[kMost] = most;
}

template <typename T>
void add_tiles(const Call& call) {
  const int64_t start = call.ints[0], ignore_index = call.ints[1];
  const int64_t rows = call.inputs[0].dims[0], width = call.inputs[0].dims[1];
  const T* logits = call.inputs[0].as<T>();
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
}

// Of `counted` rows in all.
template <typename T>
void differentiate_tiles(const Call& call, int64_t counted) {
  const int64_t start = call.ints[0], classes = call.ints[1];
  const CrossEntropy loss = {call.ints[2], call.floats[0]};
  const int64_t rows = call.inputs[1].dims[0], width = call.inputs[1].dims[1];
  const T* logits = call.inputs[1].as<T>();
  const int64_t* labels = call.inputs[2].as<int64_t>();
  const float* running = call.inputs[3].as<float>();
  T* out = call.outputs[0].as<T>();
  const float factor = *call.inputs[0].as<float>() / static_cast<float>(counted);
  const float spread = static_cast<float>(loss.smoothing / static_cast<double>(classes));
  const float keep = static_cast<float>(1.0 - loss.smoothing);
  parallel(call, rows, row_grain(width), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = logits + i * width;
      T* to = out + i * width;
      if (labels[i] == loss.ignore_index) {
        zero_run(to, width);
        continue;
      }
      const vf most = splat(running[i * kStatistics + kMost]);
      const vf scale = splat(1.0f / running[i * kStatistics + kSum]);
      const auto gradient = [&](int64_t c, int64_t valid) POCKC_LAMBDA {
        const vf terms = exponential_of_negative(load_n(row + c, valid) - most);
        return fma(terms, scale, splat(-spread)) * splat(factor);
      };
      const int64_t label = labels[i] - start;
      const bool inside = label >= 0 && label < width;
      // First, because `to` may be `row`.
      const vf of_label = inside ? fma(splat(-factor), splat(keep), gradient(label, 1)) : vf{};
      for_vectors(0, width,
                  [&](int64_t c, int64_t valid) POCKC_LAMBDA { store_n(to + c, gradient(c, valid), valid); });
      if (inside) store_n(to + label, of_label, 1);
    }
  });
}

}  // namespace

bool accepts_cross_entropy_tile(const Call& call) { return elements(call.inputs[0]) > 0; }

Status run_cross_entropy_tile(const Call& call) {
  with_elements(call.inputs[0].dtype, [&](auto zero) { add_tiles<decltype(zero)>(call); });
  return PK_OK;
}

bool accepts_cross_entropy_grad_tile(const Call& call) { return elements(call.inputs[1]) > 0; }

Status run_cross_entropy_grad_tile(const Call& call) {
  int64_t counted = 0;
  const Status status = count_rows(call.inputs[2], call.ints[1], call.ints[2], &counted);
  if (status != PK_OK) return status;
  with_elements(call.inputs[1].dtype, [&](auto zero) { differentiate_tiles<decltype(zero)>(call, counted); });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
