// What attention and its gradient share: shapes, the block of score rows, masks.
//
// A block of `block_rows` queries of one head is taken at a time; its scores against all keys it may see are
// one matrix product into the workspace, exact softmax follows, then the second product. So the scratch
// memory is one block of rows, 64 at most and about kBlockFloats floats where sequences are long, and never
// all queries times all keys. Block sizes follow from the shape alone.
#ifndef POCKC_SIMD_ATTENTION_H_
#define POCKC_SIMD_ATTENTION_H_

#include "simd/attributes.h"
#include "simd/gemm.h"
#include "simd/softmax_row.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

constexpr int64_t kBlockFloats = 32768;
constexpr int64_t kMostBlockRows = 64;
constexpr int64_t kLeastBlockRows = 8;

// Elements of a tensor, floats or halves, from one of them on.
struct Elements {
  const void* data = nullptr;
  DType dtype = DType::kF32;

  Elements() = default;
  Elements(const float* floats) : data(floats) {}
  explicit Elements(const Tensor& tensor) : data(tensor.data), dtype(tensor.dtype) {}
  Elements from(int64_t index) const {
    Elements later = *this;
    later.data = advanced(data, dtype, index);
    return later;
  }
};

struct Attention {
  int64_t batch, heads, key_heads, queries, keys, depth, value_depth;
  Elements q, k, v;
  const Tensor* mask = nullptr;
  int64_t mask_strides[4] = {};
  float scale;
  bool causal;

  Attention(const Call& call, int first, int mask_index) {
    const Tensor &tq = call.inputs[first], &tk = call.inputs[first + 1], &tv = call.inputs[first + 2];
    batch = tq.dims[0], heads = tq.dims[1], queries = tq.dims[2], depth = tq.dims[3];
    key_heads = tk.dims[1], keys = tk.dims[2], value_depth = tv.dims[3];
    q = Elements(tq), k = Elements(tk), v = Elements(tv);
    Attributes attributes(call);
    scale = attributes.real();
    causal = attributes.boolean();
    if (call.input_count <= mask_index) return;
    mask = &call.inputs[mask_index];
    int64_t pitch = 1;
    for (int i = 3; i >= 0; --i) {
      mask_strides[i] = mask->dims[i] == 1 ? 0 : pitch;
      pitch *= mask->dims[i];
    }
  }

  int64_t block_rows() const {
    const int64_t rows = maximum(kLeastBlockRows, minimum(kMostBlockRows, kBlockFloats / keys));
    return minimum(rows, queries);
  }
  int64_t score_pitch() const { return round_up(keys, 16); }
  // Keys that queries before `end` may see.
  int64_t visible(int64_t end) const { return causal ? minimum(keys, end) : keys; }
  int64_t key_head(int64_t head) const { return head / (heads / key_heads); }

  // scores[i, j] = scale q_i . k_j, masked, for queries [begin, end) of head (b, h) and keys [0,
  // visible(end)).
  void scores(int64_t b, int64_t h, int64_t begin, int64_t end, float* to, float* scratch) const;
};

inline void plain(Gemm* g, Elements a, int64_t a_stride, bool a_transposed, Elements b, int64_t b_stride,
                  bool b_transposed, float* c, int64_t c_stride) {
  g->a.data = a.data, g->a.dtype = a.dtype, g->a.stride = a_stride, g->a.transposed = a_transposed;
  Tensor right;
  right.data = const_cast<void*>(b.data), right.dtype = b.dtype;
  g->b = RightMatrix();
  g->b.set(right, 0, b_stride);
  g->b.transposed = b_transposed;
  g->c.data = c, g->c.stride = c_stride;
}

// A vector of scores, scaled and masked: where `keep` is zero nothing is seen, `add` is added. The last axis
// of a mask has one element, or one per key; most neighbours are alike, which is quicker to find than lanes
// are to set.
POCKC_INLINE vf masked(vf score, const uint8_t* keep, int64_t step, int64_t n) {
  constexpr uint8_t kNoneSeen[16] = {};
  constexpr uint8_t kAllSeen[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  if (step == 0) return *keep != 0 ? score : splat(-kInfinity);
  if (n == W && std::memcmp(keep, kAllSeen, W) == 0) return score;
  if (n == W && std::memcmp(keep, kNoneSeen, W) == 0) return splat(-kInfinity);
  const vi kept = __builtin_convertvector(load_narrow<narrow_pairs>(keep, n), vi);
  return select(kept != 0, score, splat(-kInfinity));
}
POCKC_INLINE vf masked(vf score, const float* add, int64_t step, int64_t n) {
  return score + (step == 0 ? splat(*add) : load_n(add, n));
}

template <typename T>
void scale_and_mask(float scale, const T* mask, int64_t step, int64_t seen, float* row) {
  for_vectors(0, seen, [&](int64_t j, int64_t valid) POCKC_LAMBDA {
    const vf score = load_n(row + j, valid) * splat(scale);
    store_n(row + j, mask == nullptr ? score : masked(score, mask + j * step, step, valid), valid);
  });
}

inline void finish_row(const Attention& a, int64_t b, int64_t h, int64_t i, int64_t seen, float* row) {
  const int64_t at = b * a.mask_strides[0] + h * a.mask_strides[1] + i * a.mask_strides[2];
  if (a.mask == nullptr) {
    scale_and_mask<float>(a.scale, nullptr, 0, seen, row);
  } else if (a.mask->dtype == DType::kBool) {
    scale_and_mask(a.scale, a.mask->as<uint8_t>() + at, a.mask_strides[3], seen, row);
  } else {
    scale_and_mask(a.scale, a.mask->as<float>() + at, a.mask_strides[3], seen, row);
  }
  if (!a.causal) return;
  for (int64_t j = i + 1; j < seen; ++j) row[j] = -kInfinity;
}

inline void Attention::scores(int64_t b, int64_t h, int64_t begin, int64_t end, float* to,
                              float* scratch) const {
  const int64_t seen = visible(end);
  Gemm g;
  g.m = end - begin, g.n = seen, g.k = depth;
  plain(&g, q.from(((b * heads + h) * queries + begin) * depth), depth, false,
        k.from((b * key_heads + key_head(h)) * keys * depth), depth, true, to, score_pitch());
  gemm_alone(g, scratch);
  for (int64_t i = begin; i < end; ++i) {
    finish_row(*this, b, h, i, seen, to + (i - begin) * score_pitch());
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_ATTENTION_H_
