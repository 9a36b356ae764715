// cross_entropy(logits[N,C], labels i64[M]; ignore_index, label_smoothing, first_row) -> f32[]: with e the
// smoothing and l the log-softmax, the mean over the rows that are not ignored of
// -(1 - e) * l[label] - e / C * sum(l); NaN if all are. Labels belong to M >= first_row + N rows, of which
// the logits are those from first_row on: then it is their share of the mean. cross_entropy_grad(ct, logits,
// labels; ...) = ct / rows * (softmax - (1 - e) * [label] - e / C), 0 for ignored rows; the output may be the
// logits themselves. A label outside [0, C) that is not ignored: PK_INVALID_ARGUMENT. count_correct(logits,
// labels; ignore_index) -> i64[]: rows whose first maximum is the label.
#include <cmath>

#include "common.h"

namespace pockc::ref {
namespace {

struct Loss {
  int64_t ignore_index;
  double smoothing;
  int64_t first_row;
};

bool fits(const Tensor& logits, const Tensor& labels) {
  return logits.rank == 2 && is_f32(logits) && labels.dtype == DType::kI64 &&
         has_shape(labels, {logits.dims[0]});
}

Loss read(Attributes& attributes) {
  Loss loss;
  loss.ignore_index = attributes.integer();
  loss.smoothing = attributes.number();
  loss.first_row = attributes.integer();
  return loss;
}

bool has_labels(const Tensor& logits, const Tensor& labels, const Loss& loss) {
  return logits.rank == 2 && is_f32(logits) && labels.dtype == DType::kI64 && labels.rank == 1 &&
         loss.first_row >= 0 && loss.first_row <= labels.dims[0] &&
         labels.dims[0] - loss.first_row >= logits.dims[0];
}

// How many rows are not ignored; fails when the label of one of them is no class.
Status count_rows(const Tensor& labels, int64_t classes, int64_t ignore_index, int64_t& counted) {
  counted = 0;
  for (int64_t i = 0; i < labels.dims[0]; ++i) {
    const int64_t label = labels.as<int64_t>()[i];
    if (label == ignore_index) continue;
    if (label < 0 || label >= classes) {
      return fail(PK_INVALID_ARGUMENT, "label %lld at position %lld is not one of %lld classes",
                  static_cast<long long>(label), static_cast<long long>(i), static_cast<long long>(classes));
    }
    ++counted;
  }
  return PK_OK;
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
  const Loss loss = read(attributes);
  return verdict(attributes.valid() && has_labels(call.inputs[0], call.inputs[1], loss) &&
                 is_scalar(call.outputs[0], DType::kF32));
}

Status run_cross_entropy(const Call& call) {
  const Tensor &logits = call.inputs[0], &labels = call.inputs[1];
  Attributes attributes(call);
  const Loss loss = read(attributes);
  const int64_t classes = logits.dims[1];
  int64_t counted = 0;
  const Status status = count_rows(labels, classes, loss.ignore_index, counted);
  if (status != PK_OK) return status;
  double total = 0.0;
  for (int64_t i = 0; i < logits.dims[0]; ++i) {
    const int64_t label = labels.as<int64_t>()[loss.first_row + i];
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
  const Loss loss = read(attributes);
  return verdict(attributes.valid() && is_scalar(call.inputs[0], DType::kF32) &&
                 has_labels(call.inputs[1], call.inputs[2], loss) &&
                 same_type(call.outputs[0], call.inputs[1]));
}

Status run_cross_entropy_grad(const Call& call) {
  const Tensor &logits = call.inputs[1], &labels = call.inputs[2];
  Attributes attributes(call);
  const Loss loss = read(attributes);
  const int64_t classes = logits.dims[1];
  int64_t counted = 0;
  const Status status = count_rows(labels, classes, loss.ignore_index, counted);
  if (status != PK_OK) return status;
  const double factor = *call.inputs[0].as<float>() / static_cast<double>(counted);
  const double spread = loss.smoothing / static_cast<double>(classes);
  for (int64_t i = 0; i < logits.dims[0]; ++i) {
    const int64_t label = labels.as<int64_t>()[loss.first_row + i];
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
  if (!has_operands(call, 2, 2, 1)) return PK_BAD_FILE;
  Attributes attributes(call);
  attributes.integer();
  return verdict(attributes.valid() && fits(call.inputs[0], call.inputs[1]) &&
                 is_scalar(call.outputs[0], DType::kI64));
}

Status run_count_correct(const Call& call) {
  const Tensor &logits = call.inputs[0], &labels = call.inputs[1];
  const int64_t ignore_index = Attributes(call).integer(), classes = logits.dims[1];
  int64_t correct = 0;
  for (int64_t i = 0; i < logits.dims[0]; ++i) {
    const float* row = logits.as<float>() + i * classes;
    int64_t best = 0;
    for (int64_t c = 1; c < classes; ++c) best = row[c] > row[best] ? c : best;
    const int64_t label = labels.as<int64_t>()[i];
    if (label != ignore_index && label == best) ++correct;
  }
  *call.outputs[0].as<int64_t>() = correct;
  return PK_OK;
}

}  // namespace pockc::ref
