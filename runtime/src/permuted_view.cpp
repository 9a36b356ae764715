#include "permuted_view.h"

#include <cstring>

namespace pockc {

PermutedView::PermutedView(const StateRecord& state, const Tensor& stored)
    : stored_(stored.as<unsigned char>()),
      elements_(stored.elements()),
      element_size_(is_compact(stored.dtype) ? sizeof(float) : dtype_size(stored.dtype)),
      identity_(true),
      rank_(stored.rank) {
  if (is_compact(stored.dtype)) compact_ = compact_rows(stored);
  int64_t stride = 1;
  for (int axis = rank_ - 1; axis >= 0; --axis) {
    const int original = state.permutation_rank == 0 ? axis : state.permutation[axis];
    dims_[original] = stored.dims[axis];
    strides_[original] = stride;
    stride *= stored.dims[axis];
    identity_ = identity_ && original == axis;
  }
}

// Calls copy(index of the stored element, position in the range) for the elements of the range, in the user's
// order.
template <typename Copy>
void PermutedView::walk(int64_t begin, int64_t count, Copy copy) const {
  int64_t index[kMaxRank] = {};
  int64_t offset = 0;
  int64_t rest = begin;
  for (int axis = rank_ - 1; axis >= 0; --axis) {
    index[axis] = rest % dims_[axis];
    rest /= dims_[axis];
    offset += index[axis] * strides_[axis];
  }
  for (int64_t position = 0; position < count; ++position) {
    copy(offset, position);
    for (int axis = rank_ - 1; axis >= 0; --axis) {
      offset += strides_[axis];
      if (++index[axis] < dims_[axis]) break;
      offset -= strides_[axis] * dims_[axis];
      index[axis] = 0;
    }
  }
}

void PermutedView::gather(int64_t begin, int64_t count, void* out) const {
  unsigned char* bytes = static_cast<unsigned char*>(out);
  const int64_t size = static_cast<int64_t>(element_size_);
  if (compact_.data != nullptr) {
    gather_decoded(begin, count, bytes);
    return;
  }
  if (identity_) {
    std::memcpy(bytes, stored_ + begin * size, count * size);
    return;
  }
  const unsigned char* stored = stored_;
  walk(begin, count,
       [=](int64_t element, int64_t i) { std::memcpy(bytes + i * size, stored + element * size, size); });
}

void PermutedView::gather_decoded(int64_t begin, int64_t count, unsigned char* out) const {
  walk(begin, count, [&](int64_t element, int64_t i) {
    float value;
    decode(compact_, element / compact_.columns, element % compact_.columns, 1, &value);
    std::memcpy(out + i * static_cast<int64_t>(sizeof(value)), &value, sizeof(value));
  });
}

void PermutedView::scatter(int64_t begin, int64_t count, const void* in) const {
  const unsigned char* bytes = static_cast<const unsigned char*>(in);
  const int64_t size = static_cast<int64_t>(element_size_);
  if (identity_) {
    std::memcpy(stored_ + begin * size, bytes, count * size);
    return;
  }
  unsigned char* stored = stored_;
  walk(begin, count,
       [=](int64_t element, int64_t i) { std::memcpy(stored + element * size, bytes + i * size, size); });
}

}  // namespace pockc
