// cross_entropy(logits[N,C], labels i64[M]; ignore_index, label_smoothing, first_row) -> f32[]: with e the
// smoothing and l the log-softmax, the mean over the rows that are not ignored of
// -(1 - e) * l[label] - e / C * sum(l); NaN if all are. Where first_row is not negative, labels belong to M
// >= first_row + N rows, of which the logits are those from first_row on: then it is their share of the mean.
// cross_entropy_grad(ct, logits, labels; ...) = ct / rows * (softmax - (1 - e) * [label] - e / C), 0 for
// ignored rows; the output may be the logits themselves. A label outside [0, C) that is not ignored:
// PK_INVALID_ARGUMENT. count_correct(logits, labels; samples, ignore_index) -> (i64[samples], i64[samples]):
// how many of each sample's rows have the label as their first maximum, and how many are not ignored.
#include <algorithm>
#include <cmath>

#include "cross_entropy.h"

namespace pockc::ref {
namespace {

bool fits(const Tensor& logits, const Tensor& labels) {
  return logits.rank == 2 && is_f32(logits) && labels.dtype == DType::kI64 &&
         has_shape(labels, {logits.dims[0]});
}

// Whether the labels are those of the logits' rows, or from first_row 0 on of more rows.
bool has_labels(const Tensor& logits, const Tensor& labels, int64_t first_row) {
  if (first_row < 0) return fits(logits, labels);
  return logits.rank == 2 && is_f32(logits) && labels.dtype == DType::kI64 && labels.rank == 1 &&
         first_row <= labels.dims[0] && labels.dims[0] - first_row >= logits.dims[0];
}

double log_sum_exp(const float* x, int64_t length) {
  float highest = x[0];
  for (int64_t i = 1; i < length; ++i) highest = x[i] > highest ? x[i] : highest;
  double total = 0.0;
  for (int64_t i = 0; i < length; ++i) total += std::exp(static_cast<double>(x[i]) - highest);
  return highest + std::log(total);
}

}  // namespace

Status check_cross_entropy(const Call& call) {
  if (!has_operands(call, 2, 2, 1)) return PK_BAD_FILE;
  Attributes attributes(call);
  read_cross_entropy(attributes);
  const int64_t first_row = attributes.integer();
  return verdict(attributes.valid() && has_labels(call.inputs[0], call.inputs[1], first_row) &&
                 is_scalar(call.outputs[0], DType::kF32));
}

Status run_cross_entropy(const Call& call) {
  const Tensor &logits = call.inputs[0], &labels = call.inputs[1];
  Attributes attributes(call);
  const CrossEntropy loss = read_cross_entropy(attributes);
  const int64_t* label_of = labels.as<int64_t>() + std::max<int64_t>(0, attributes.integer());
  const int64_t classes = logits.dims[1];
  int64_t counted = 0;
  const Status status = count_rows(labels, classes, loss.ignore_index, counted);
  if (status != PK_OK) return status;
  double total = 0.0;
  for (int64_t i = 0; i < logits.dims[0]; ++i) {
    const int64_t label = label_of[i];
    if (label == loss.ignore_index) continue;
    const float* row = logits.as<float>() + i * classes;
    const double normaliser = log_sum_exp(row, classes);
    total += (1.0 - loss.smoothing) * (normaliser - row[label]);
    if (loss.smoothing == 0.0) continue;
    double sum = 0.0;
    for (int64_t c = 0; c < classes; ++c) sum += normaliser - row[c];
    total += loss.smoothing / static_cast<double>(classes) * sum;
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  *call.outputs[0].as<float>() =
      counted == 0 ? nan : static_cast<float>(total / static_cast<double>(counted));
  return PK_OK;
}

Status check_cross_entropy_grad(const Call& call) {
  if (!has_operands(call, 3, 3, 1)) return PK_BAD_FILE;
  Attributes attributes(call);
  read_cross_entropy(attributes);
  const int64_t first_row = attributes.integer();
  return verdict(attributes.valid() && is_scalar(call.inputs[0], DType::kF32) &&
                 has_labels(call.inputs[1], call.inputs[2], first_row) &&
                 same_type(call.outputs[0], call.inputs[1]));
}

Status run_cross_entropy_grad(const Call& call) {
  const Tensor &logits = call.inputs[1], &labels = call.inputs[2];
  Attributes attributes(call);
  const CrossEntropy loss = read_cross_entropy(attributes);
  const int64_t* label_of = labels.as<int64_t>() + std::max<int64_t>(0, attributes.integer());
  const int64_t classes = logits.dims[1];
  int64_t counted = 0;
  const Status status = count_rows(labels, classes, loss.ignore_index, counted);
  if (status != PK_OK) return status;
  const double factor = *call.inputs[0].as<float>() / static_cast<double>(counted);
  const double spread = loss.smoothing / static_cast<double>(classes);
  for (int64_t i = 0; i < logits.dims[0]; ++i) {
    const int64_t label = label_of[i];
    const float* row = logits.as<float>() + i * classes;
    float* out = call.outputs[0].as<float>() + i * classes;
    if (label == loss.ignore_index) {
      for (int64_t c = 0; c < classes; ++c) out[c] = 0.0f;
      continue;
    }
    const double normaliser = log_sum_exp(row, classes);
    for (int64_t c = 0; c < classes; ++c) {
      const double target = spread + (c == label ? 1.0 - loss.smoothing : 0.0);
      out[c] = static_cast<float>(factor * (std::exp(row[c] - normaliser) - target));
    }
  }
  return PK_OK;
}

Status check_count_correct(const Call& call) {
  return verdict(has_operands(call, 2, 2, 2) && fits(call.inputs[0], call.inputs[1]) &&
                 counts_samples(call, call.inputs[1]));
}

Status run_count_correct(const Call& call) {
  const Tensor &logits = call.inputs[0], &labels = call.inputs[1];
  const int64_t classes = logits.dims[1];
  count_samples(call, labels, [&](int64_t i) {
    const float* row = logits.as<float>() + i * classes;
    int64_t best = 0;
    for (int64_t c = 1; c < classes; ++c) best = row[c] > row[best] ? c : best;
    return best;
  });
  return PK_OK;
}

}  // namespace pockc::ref
