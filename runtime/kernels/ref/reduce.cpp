// reduce_sum, reduce_mean, reduce_max (x; axes, keepdims) and sum_squares(x). Sums of floats run in f64.
#include "common.h"

namespace pockc::ref {
namespace {

struct Reduction {
  bool reduced[kMaxRank] = {};
  int64_t count = 1;  // elements of x per element of the output
};

// Reads `axes` (sorted, distinct, not empty) and `keepdims`; false where they or the output's shape do not
// fit.
bool read(const Call& call, Reduction& reduction) {
  const Tensor &x = call.inputs[0], &out = call.outputs[0];
  Attributes attributes(call);
  const Tuple axes = attributes.tuple(0, x.rank - 1);
  const bool keep = attributes.boolean();
  if (!attributes.valid() || axes.size == 0) return false;
  for (int i = 0; i < axes.size; ++i) {
    if (i > 0 && axes[i] <= axes[i - 1]) return false;
    reduction.reduced[axes[i]] = true;
    reduction.count *= x.dims[axes[i]];
  }
  Tuple shape;
  for (int i = 0; i < x.rank; ++i) {
    if (!reduction.reduced[i]) shape.values[shape.size++] = x.dims[i];
    if (reduction.reduced[i] && keep) shape.values[shape.size++] = 1;
  }
  return has_shape(out, shape);
}

bool fits(const Call& call) {
  Reduction reduction;
  return has_operands(call, 1, 1, 1) && call.inputs[0].dtype == call.outputs[0].dtype &&
         read(call, reduction);
}

constexpr int64_t kChunk = 64;

// Walks the outputs in chunks of neighbours and, inside, the reduced axes, so that memory is read along x's
// rows whichever axes are reduced. `add(total, element)` folds, `finish(total)` gives the output.
template <typename T, typename Total, typename Add, typename Finish>
void reduce(const Call& call, Total initial, Add add, Finish finish) {
  const Tensor& x = call.inputs[0];
  Reduction reduction;
  read(call, reduction);
  int64_t strides[kMaxRank] = {};
  dense_strides(x, strides);
  Nest<1> kept, summed;
  for (int i = 0; i < x.rank; ++i) (reduction.reduced[i] ? summed : kept).append(x.dims[i], {strides[i]});

  const T* data = x.as<T>();
  T* out = call.outputs[0].as<T>();
  kept.for_each_row([&](const int64_t (&row)[1], int64_t row_count) {
    for (int64_t first = 0; first < row_count; first += kChunk) {
      const int64_t chunk = row_count - first < kChunk ? row_count - first : kChunk;
      const T* start = data + row[0] + first * kept.step(0);
      Total totals[kChunk];
      for (int64_t j = 0; j < chunk; ++j) totals[j] = initial;
      summed.for_each_row([&](const int64_t (&at)[1], int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
          const T* source = start + at[0] + i * summed.step(0);
          for (int64_t j = 0; j < chunk; ++j) totals[j] = add(totals[j], source[j * kept.step(0)]);
        }
      });
      for (int64_t j = 0; j < chunk; ++j) *out++ = finish(totals[j]);
    }
  });
}

}  // namespace

Status check_reduce_sum(const Call& call) {
  return verdict(fits(call) && (is_f32(call.inputs[0]) || call.inputs[0].dtype == DType::kI64));
}

Status run_reduce_sum(const Call& call) {
  if (is_f32(call.inputs[0])) {
    reduce<float>(
        call, 0.0, [](double total, float x) { return total + x; },
        [](double total) { return static_cast<float>(total); });
    return PK_OK;
  }
  reduce<int64_t>(
      call, uint64_t{0}, [](uint64_t total, int64_t x) { return total + static_cast<uint64_t>(x); },
      [](uint64_t total) { return static_cast<int64_t>(total); });
  return PK_OK;
}

Status check_reduce_mean(const Call& call) { return verdict(fits(call) && is_f32(call.inputs[0])); }

Status run_reduce_mean(const Call& call) {
  Reduction reduction;
  read(call, reduction);
  const double count = static_cast<double>(reduction.count);
  reduce<float>(
      call, 0.0, [](double total, float x) { return total + x; },
      [count](double total) { return static_cast<float>(total / count); });
  return PK_OK;
}

Status check_reduce_max(const Call& call) { return verdict(fits(call) && is_f32(call.inputs[0])); }

// `x != x` is true for NaN alone, which stays once it is the maximum.
Status run_reduce_max(const Call& call) {
  reduce<float>(
      call, -std::numeric_limits<float>::infinity(),
      [](float total, float x) { return x > total || x != x ? x : total; },
      [](float total) { return total; });
  return PK_OK;
}

// sum_squares(x) -> f32[]
Status check_sum_squares(const Call& call) {
  return verdict(has_operands(call, 1, 1, 1) && no_attributes(call) && all_f32(call) &&
                 call.outputs[0].rank == 0);
}

Status run_sum_squares(const Call& call) {
  const float* x = call.inputs[0].as<float>();
  const int64_t elements = call.inputs[0].elements();
  double total = 0.0;
  for (int64_t i = 0; i < elements; ++i) total += static_cast<double>(x[i]) * x[i];
  *call.outputs[0].as<float>() = static_cast<float>(total);
  return PK_OK;
}

}  // namespace pockc::ref
