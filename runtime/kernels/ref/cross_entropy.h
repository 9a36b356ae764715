// Shared by cross entropy over whole rows of logits and over tiles of the classes.
#ifndef POCKC_KERNELS_REF_CROSS_ENTROPY_H_
#define POCKC_KERNELS_REF_CROSS_ENTROPY_H_

#include "common.h"

namespace pockc::ref {

struct CrossEntropy {
  int64_t ignore_index;
  double smoothing;
};

inline CrossEntropy read_cross_entropy(Attributes& attributes) {
  CrossEntropy loss;
  loss.ignore_index = attributes.integer();
  loss.smoothing = attributes.number();
  return loss;
}

// How many rows are not ignored; fails when the label of one of them is no class.
inline Status count_rows(const Tensor& labels, int64_t classes, int64_t ignore_index, int64_t& counted) {
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

// Whether the attributes (samples, ignore_index) and the two outputs are those of a count of `labels`, whose
// rows belong to equally many per sample.
inline bool counts_samples(const Call& call, const Tensor& labels) {
  Attributes attributes(call);
  const int64_t samples = attributes.integer(1, kMaxElements);
  attributes.integer();
  if (!attributes.valid() || labels.dims[0] % samples != 0) return false;
  for (int i = 0; i < 2; ++i) {
    if (call.outputs[i].dtype != DType::kI64 || !has_shape(call.outputs[i], {samples})) return false;
  }
  return true;
}

// Fills both outputs; best(i) is the class of row i.
template <typename Best>
void count_samples(const Call& call, const Tensor& labels, Best&& best) {
  Attributes attributes(call);
  const int64_t samples = attributes.integer(), ignore_index = attributes.integer();
  const int64_t rows = labels.dims[0] / samples;
  for (int64_t sample = 0; sample < samples; ++sample) {
    int64_t correct = 0, counted = 0;
    for (int64_t i = sample * rows; i < (sample + 1) * rows; ++i) {
      const int64_t label = labels.as<int64_t>()[i];
      if (label == ignore_index) continue;
      correct += label == best(i) ? 1 : 0;
      ++counted;
    }
    call.outputs[0].as<int64_t>()[sample] = correct;
    call.outputs[1].as<int64_t>()[sample] = counted;
  }
}

}  // namespace pockc::ref

#endif  // POCKC_KERNELS_REF_CROSS_ENTROPY_H_
