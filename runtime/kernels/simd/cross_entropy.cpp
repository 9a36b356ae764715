// cross_entropy and its gradient (the maths: see the reference kernel). Row losses go to the workspace, [N]
// floats, and are added by sixteen lanes, so the result does not depend on how rows are split.
#include "simd/cross_entropy.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

CrossEntropy read(const Call& call) { return {call.ints[0], call.floats[0]}; }
int64_t first_row(const Call& call) { return maximum<int64_t>(0, call.ints[1]); }

}  // namespace

bool accepts_cross_entropy(const Call& call) {
  return elements(call.inputs[0]) > 0 && has_workspace(call, 0, round_up(call.inputs[0].dims[0], 16));
}

Status run_cross_entropy(const Call& call) {
  const CrossEntropy loss = read(call);
  const int64_t rows = call.inputs[0].dims[0], classes = call.inputs[0].dims[1];
  int64_t counted = 0;
  const Status status = count_rows(call.inputs[1], classes, loss.ignore_index, &counted);
  if (status != PK_OK) return status;
  const float* logits = call.inputs[0].as<float>();
  const int64_t* labels = call.inputs[1].as<int64_t>() + first_row(call);
  float* losses = workspace(call);
  const float keep = static_cast<float>(1.0 - loss.smoothing), spread = static_cast<float>(loss.smoothing);
  parallel(call, rows, row_grain(classes), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      losses[i] = 0;
      if (labels[i] == loss.ignore_index) continue;
      const float* row = logits + i * classes;
      const float log_sum = row_log_sum(row, classes);
      losses[i] = keep * (log_sum - row[labels[i]]);
      if (spread == 0.0f) continue;
      losses[i] += spread * (log_sum - row_sum(row, classes) / static_cast<float>(classes));
    }
  });
  *call.outputs[0].as<float>() =
      counted == 0 ? __builtin_nanf("") : row_sum(losses, rows) / static_cast<float>(counted);
  return PK_OK;
}

bool accepts_cross_entropy_grad(const Call& call) { return elements(call.inputs[1]) > 0; }

Status run_cross_entropy_grad(const Call& call) {
  const CrossEntropy loss = read(call);
  const int64_t rows = call.inputs[1].dims[0], classes = call.inputs[1].dims[1];
  int64_t counted = 0;
  const Status status = count_rows(call.inputs[2], classes, loss.ignore_index, &counted);
  if (status != PK_OK) return status;
  const float* logits = call.inputs[1].as<float>();
  const int64_t* labels = call.inputs[2].as<int64_t>() + first_row(call);
  float* out = call.outputs[0].as<float>();
  const float factor = *call.inputs[0].as<float>() / static_cast<float>(counted);
  const float spread = static_cast<float>(loss.smoothing / static_cast<double>(classes));
  const float keep = static_cast<float>(1.0 - loss.smoothing);
  parallel(call, rows, row_grain(classes), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = logits + i * classes;
      float* to = out + i * classes;
      if (labels[i] == loss.ignore_index) {
        for (int64_t c = 0; c < classes; ++c) to[c] = 0;
        continue;
      }
      const vf scale = splat(1.0f / row_exponentials(row, classes, row_max(row, classes), to));
      for_vectors(0, classes, [&](int64_t c, int64_t valid) POCKC_LAMBDA {
        const vf difference = fma(load_n(to + c, valid), scale, splat(-spread));
        store_n(to + c, difference * splat(factor), valid);
      });
      to[labels[i]] = fma(-factor, keep, to[labels[i]]);
    }
  });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
