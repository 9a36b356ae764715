// Cross entropy over tiles of the classes. What is known of a row after some tiles are five numbers,
// `running` f32[N,5]: largest logit m, sum of e^(logit - m), the label's logit (0 before its tile), sum of
// the logits, and the class of the first largest logit.
//   cross_entropy_tile(logits[N,W], labels i64[N], [running]; start, ignore_index) -> running': of all tiles
//   so
//     far, where the tile holds the classes [start, start + W). The output may be `running`.
//   cross_entropy_of_tiles(running, labels; classes, ignore_index, label_smoothing) -> f32[]: cross_entropy
//   of
//     all classes.
//   cross_entropy_grad_tile(ct, logits[N,W], labels, running; start, classes, ignore_index, label_smoothing):
//     columns [start, start + W) of cross_entropy_grad. The output may be the logits.
//   count_correct_of_tiles(running, labels; samples, ignore_index) -> (i64[samples], i64[samples]): as
//     count_correct.
#include <cmath>

#include "cross_entropy.h"

namespace pockc::ref {
namespace {

constexpr int64_t kStatistics = 5;
constexpr int64_t kMostClasses = int64_t{1} << 24;  // so that a float holds every class exactly
enum { kMost, kSum, kLabel, kTotal, kBest };

bool is_running(const Tensor& running, const Tensor& labels) {
  return is_f32(running) && labels.dtype == DType::kI64 && labels.rank == 1 &&
         has_shape(running, {labels.dims[0], kStatistics});
}

bool is_tile(const Tensor& logits, const Tensor& labels, int64_t start, int64_t classes) {
  return is_f32(logits) && logits.rank == 2 && labels.dtype == DType::kI64 &&
         has_shape(labels, {logits.dims[0]}) && start <= classes - logits.dims[1];
}

}  // namespace

Status check_cross_entropy_tile(const Call& call) {
  if (!has_operands(call, 2, 3, 1)) return PK_BAD_FILE;
  Attributes attributes(call);
  const int64_t start = attributes.integer(0, kMostClasses);
  attributes.integer();
  const Tensor& labels = call.inputs[1];
  return verdict(attributes.valid() && is_tile(call.inputs[0], labels, start, kMostClasses) &&
                 is_running(call.outputs[0], labels) &&
                 (call.input_count == 2 || is_running(call.inputs[2], labels)));
}

Status run_cross_entropy_tile(const Call& call) {
  Attributes attributes(call);
  const int64_t start = attributes.integer(), ignore_index = attributes.integer();
  const int64_t width = call.inputs[0].dims[1];
  const float infinity = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < call.inputs[0].dims[0]; ++i) {
    float known[kStatistics] = {-infinity};
    if (call.input_count == 3)
      std::memcpy(known, call.inputs[2].as<float>() + i * kStatistics, sizeof(known));
    const float* row = call.inputs[0].as<float>() + i * width;
    int64_t best = 0;
    for (int64_t c = 1; c < width; ++c) best = row[c] > row[best] ? c : best;
    const float before = known[kMost];
    const float most = row[best] > before || std::isnan(row[best]) ? row[best] : before;
    const double shift = most == -infinity ? 0.0 : most;  // of a row of -inf alone the sum is 0, not NaN
    double sum = known[kSum] * std::exp(static_cast<double>(before) - shift), total = known[kTotal];
    for (int64_t c = 0; c < width; ++c) {
      sum += std::exp(row[c] - shift);
      total += row[c];
    }
    const int64_t label = call.inputs[1].as<int64_t>()[i];
    if (label != ignore_index && label >= start && label < start + width) known[kLabel] = row[label - start];
    if (row[best] > before) known[kBest] = static_cast<float>(start + best);
    known[kMost] = most;
    known[kSum] = static_cast<float>(sum);
    known[kTotal] = static_cast<float>(total);
    std::memcpy(call.outputs[0].as<float>() + i * kStatistics, known, sizeof(known));
  }
  return PK_OK;
}

Status check_cross_entropy_of_tiles(const Call& call) {
  if (!has_operands(call, 2, 2, 1)) return PK_BAD_FILE;
  Attributes attributes(call);
  attributes.integer(1, kMostClasses);
  read_cross_entropy(attributes);
  return verdict(attributes.valid() && is_running(call.inputs[0], call.inputs[1]) &&
                 is_scalar(call.outputs[0], DType::kF32));
}

Status run_cross_entropy_of_tiles(const Call& call) {
  Attributes attributes(call);
  const int64_t classes = attributes.integer();
  const CrossEntropy loss = read_cross_entropy(attributes);
  const Tensor& labels = call.inputs[1];
  int64_t counted = 0;
  const Status status = count_rows(labels, classes, loss.ignore_index, counted);
  if (status != PK_OK) return status;
  double total = 0.0;
  for (int64_t i = 0; i < labels.dims[0]; ++i) {
    if (labels.as<int64_t>()[i] == loss.ignore_index) continue;
    const float* row = call.inputs[0].as<float>() + i * kStatistics;
    const double normaliser = row[kMost] + std::log(static_cast<double>(row[kSum]));
    total += (1.0 - loss.smoothing) * (normaliser - row[kLabel]);
    if (loss.smoothing == 0.0) continue;
    total += loss.smoothing * (normaliser - row[kTotal] / static_cast<double>(classes));
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  *call.outputs[0].as<float>() =
      counted == 0 ? nan : static_cast<float>(total / static_cast<double>(counted));
  return PK_OK;
}

Status check_cross_entropy_grad_tile(const Call& call) {
  if (!has_operands(call, 4, 4, 1)) return PK_BAD_FILE;
  Attributes attributes(call);
  const int64_t start = attributes.integer(0, kMostClasses), classes = attributes.integer(1, kMostClasses);
  read_cross_entropy(attributes);
  const Tensor &logits = call.inputs[1], &labels = call.inputs[2];
  return verdict(attributes.valid() && is_scalar(call.inputs[0], DType::kF32) &&
                 is_tile(logits, labels, start, classes) && is_running(call.inputs[3], labels) &&
                 same_type(call.outputs[0], logits));
}

Status run_cross_entropy_grad_tile(const Call& call) {
  Attributes attributes(call);
  const int64_t start = attributes.integer(), classes = attributes.integer();
  const CrossEntropy loss = read_cross_entropy(attributes);
  const Tensor &logits = call.inputs[1], &labels = call.inputs[2];
  int64_t counted = 0;
  const Status status = count_rows(labels, classes, loss.ignore_index, counted);
  if (status != PK_OK) return status;
  const double factor = *call.inputs[0].as<float>() / static_cast<double>(counted);
  const double spread = loss.smoothing / static_cast<double>(classes);
  const int64_t width = logits.dims[1];
  for (int64_t i = 0; i < logits.dims[0]; ++i) {
    const int64_t label = labels.as<int64_t>()[i];
    const float* row = logits.as<float>() + i * width;
    const float* known = call.inputs[3].as<float>() + i * kStatistics;
    float* out = call.outputs[0].as<float>() + i * width;
    if (label == loss.ignore_index) {
      for (int64_t c = 0; c < width; ++c) out[c] = 0.0f;
      continue;
    }
    const double normaliser = known[kMost] + std::log(static_cast<double>(known[kSum]));
    for (int64_t c = 0; c < width; ++c) {
      const double target = spread + (start + c == label ? 1.0 - loss.smoothing : 0.0);
      out[c] = static_cast<float>(factor * (std::exp(row[c] - normaliser) - target));
    }
  }
  return PK_OK;
}

Status check_count_correct_of_tiles(const Call& call) {
  return verdict(has_operands(call, 2, 2, 2) && is_running(call.inputs[0], call.inputs[1]) &&
                 counts_samples(call, call.inputs[1]));
}

Status run_count_correct_of_tiles(const Call& call) {
  const float* running = call.inputs[0].as<float>();
  count_samples(call, call.inputs[1],
                [=](int64_t i) { return static_cast<int64_t>(running[i * kStatistics + kBest]); });
  return PK_OK;
}

}  // namespace pockc::ref
