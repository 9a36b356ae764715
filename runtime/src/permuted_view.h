// A state's stored elements in the order of the user's layout; compact ones are seen as floats.
#ifndef POCKC_SRC_PERMUTED_VIEW_H_
#define POCKC_SRC_PERMUTED_VIEW_H_

#include "program.h"

namespace pockc {

class PermutedView {
 public:
  // `stored` is a tensor of the session that holds the state.
  PermutedView(const StateRecord& state, const Tensor& stored);

  int64_t elements() const { return elements_; }
  size_t element_size() const { return element_size_; }

  // Copies elements [begin, begin + count) of the user's row-major order out of, or into, the stored tensor,
  // which is not compact then. The other side may have any alignment.
  void gather(int64_t begin, int64_t count, void* out) const;
  void scatter(int64_t begin, int64_t count, const void* in) const;

 private:
  void gather_decoded(int64_t begin, int64_t count, unsigned char* out) const;
  template <typename Copy>
  void walk(int64_t begin, int64_t count, Copy copy) const;

  CompactRows compact_;  // instead of `stored_`, where its data is not null
  unsigned char* stored_;
  int64_t elements_;
  size_t element_size_;
  bool identity_;
  int32_t rank_;
  int64_t dims_[kMaxRank] = {};     // user's layout
  int64_t strides_[kMaxRank] = {};  // of the user's axes in the stored tensor, in elements
};

}  // namespace pockc

#endif  // POCKC_SRC_PERMUTED_VIEW_H_
