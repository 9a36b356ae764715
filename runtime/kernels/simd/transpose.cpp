// transpose of 4-byte elements, and of pairs of 16-bit ones. Axes that stay neighbours are merged first. Two
// forms remain for nearly all uses:
//   [outer, rows, columns] -> [outer, columns, rows] (a matrix, NCHW <-> NHWC): W x W blocks in registers;
//   the last axis stays (heads of attention): runs are copied.
// Others go to the reference kernel.
#include "simd/attributes.h"
#include "simd/halves.h"
#include "simd/patches.h"
#include "simd/transpose_square.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

struct Permutation {
  int rank = 0;
  int64_t dims[kMaxRank];     // of the input, merged
  int64_t strides[kMaxRank];  // of the input
  int order[kMaxRank];        // output axis i is input axis order[i]
};

Permutation merge(const Call& call) {
  const Tensor& x = call.inputs[0];
  // Output order without axes of one element; then runs of consecutive input axes become one axis.
  int order[kMaxRank], count = 0;
  for (int i = 0; i < x.rank; ++i) {
    const int axis = static_cast<int>(call.ints[1 + i]);
    if (x.dims[axis] != 1) order[count++] = axis;
  }
  const auto follows = [&](int a, int b) {  // b is the next input axis after a that has more than one element
    if (b <= a) return false;
    for (int i = a + 1; i < b; ++i) {
      if (x.dims[i] != 1) return false;
    }
    return true;
  };
  int first_axis[kMaxRank];
  int64_t size[kMaxRank];
  Permutation p;
  for (int i = 0; i < count; ++i) {
    if (i > 0 && follows(order[i - 1], order[i])) {
      size[p.rank - 1] *= x.dims[order[i]];
    } else {
      first_axis[p.rank] = order[i];
      size[p.rank++] = x.dims[order[i]];
    }
  }
  for (int i = 0; i < p.rank; ++i) {
    p.order[i] = 0;
    for (int j = 0; j < p.rank; ++j) p.order[i] += first_axis[j] < first_axis[i];
    p.dims[p.order[i]] = size[i];
  }
  int64_t pitch = 1;
  for (int i = p.rank - 1; i >= 0; --i) {
    p.strides[i] = pitch;
    pitch *= p.dims[i];
  }
  return p;
}

bool is_matrix(const Permutation& p) {
  if (p.rank == 2) return p.order[0] == 1;
  return p.rank == 3 && p.order[0] == 0 && p.order[1] == 2;
}
bool keeps_last(const Permutation& p) { return p.rank == 0 || p.order[p.rank - 1] == p.rank - 1; }

void transpose_block(const float* from, int64_t rows, int64_t columns, int64_t from_pitch, float* to,
                     int64_t to_pitch) {
  vf x[W];
  POCKC_UNROLL
  for (int i = 0; i < W; ++i) x[i] = i < rows ? load_n(from + i * from_pitch, columns) : vf{};
  transpose_square<1>(x);
  if (rows == W && columns == W) {
    POCKC_UNROLL
    for (int i = 0; i < W; ++i) store(to + i * to_pitch, x[i]);
    return;
  }
  for (int i = 0; i < columns; ++i) store_n(to + i * to_pitch, x[i], rows);
}

void transpose_matrix(const float* from, int64_t rows, int64_t columns, int64_t c0, int64_t c1, float* to) {
  for (int64_t c = c0; c < c1; c += W) {
    for (int64_t r = 0; r < rows; r += W) {
      transpose_block(from + r * columns + c, minimum<int64_t>(W, rows - r), minimum<int64_t>(W, c1 - c),
                      columns, to + c * rows + r, rows);
    }
  }
}

// Where the runs of consecutive output rows begin in the input: counters, because a division takes as long as
// copying a short run.
struct RowWalk {
  const Permutation& p;
  int64_t index[kMaxRank] = {};  // of the output's axes, without the last
  int64_t offset = 0;

  RowWalk(const Permutation& p, int64_t row) : p(p) {
    for (int i = p.rank - 2; i >= 0; --i) {
      index[i] = row % size(i);
      offset += index[i] * stride(i);
      row /= size(i);
    }
  }
  POCKC_INLINE int64_t size(int i) const { return p.dims[p.order[i]]; }
  POCKC_INLINE int64_t stride(int i) const { return p.strides[p.order[i]]; }
  POCKC_INLINE void next() {
    for (int i = p.rank - 2; i >= 0; --i) {
      offset += stride(i);
      if (++index[i] < size(i)) return;
      offset -= size(i) * stride(i);
      index[i] = 0;
    }
  }
};

constexpr int64_t kRowsAhead = 8;  // that are asked of the memory: the hardware does not foresee their places
constexpr int64_t kAskedFloats = 64;  // of each; from there on it does

void copy_rows(const Permutation& p, const float* x, int64_t run, int64_t begin, int64_t end, float* out) {
  RowWalk at(p, begin), later(p, begin + kRowsAhead);  // past the last row it is at the first ones again
  for (int64_t row = begin; row < end; ++row, at.next(), later.next()) {
    for (int64_t i = 0; i < minimum(run, kAskedFloats); i += 16) __builtin_prefetch(x + later.offset + i);
    copy_run(out + row * run, x + at.offset, run);
  }
}

}  // namespace

bool accepts_transpose(const Call& call) {
  const DType type = call.inputs[0].dtype;
  if (elements(call.inputs[0]) == 0) return false;
  const Permutation p = merge(call);
  if (is_half(type)) return keeps_last(p) && p.rank > 0 && p.dims[p.rank - 1] % 2 == 0;
  if (type != DType::kF32 && type != DType::kI32) return false;
  return is_matrix(p) || keeps_last(p);
}

Status run_transpose(const Call& call) {
  Permutation p = merge(call);
  int64_t count = elements(call.inputs[0]);
  if (is_half(call.inputs[0].dtype)) {  // two of them are moved as one float
    count /= 2;
    p.dims[p.rank - 1] /= 2;
    for (int i = 0; i < p.rank - 1; ++i) p.strides[i] /= 2;
  }
  const float* x = call.inputs[0].as<float>();
  float* out = call.outputs[0].as<float>();
  if (is_matrix(p) && !is_half(call.inputs[0].dtype)) {
    const int64_t rows = p.dims[p.rank - 2], columns = p.dims[p.rank - 1],
                  outer = p.rank == 3 ? p.dims[0] : 1;
    const int64_t strips = divide_up(columns, 16);
    const int64_t grain = maximum<int64_t>(1, kElementGrain / (16 * rows));
    parallel(call, outer * strips, grain, [&](int64_t begin, int64_t end, int) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t offset = unit / strips * rows * columns, c = unit % strips * 16;
        transpose_matrix(x + offset, rows, columns, c, minimum(columns, c + 16), out + offset);
      }
    });
    return PK_OK;
  }
  const int64_t run = p.rank == 0 ? 1 : p.dims[p.rank - 1];
  const int64_t rows = count / run;
  parallel(call, rows, maximum<int64_t>(1, kElementGrain / run),
           [&](int64_t begin, int64_t end, int) { copy_rows(p, x, run, begin, end, out); });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
