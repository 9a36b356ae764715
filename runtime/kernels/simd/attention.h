// What attention and its gradient share: shapes, tiles of scores, masks.
//
// Scores are never held as a whole, but a tile at a time: kTileQueries queries of a head against kTileKeys
// keys, in the second-level cache whatever the length of the sequence, so that the time of a score does not
// grow with it, nor the workspace. Tiles that a causal mask hides are skipped, and one on the diagonal ends
// where its last query does. Each tile is a matrix product, what softmax makes of its rows, and products of
// that with other operands, to which tiles add one after the other. Their sizes follow from the shape alone.
#ifndef POCKC_SIMD_ATTENTION_H_
#define POCKC_SIMD_ATTENTION_H_

#include "simd/attributes.h"
#include "simd/gemm.h"
#include "simd/softmax_row.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

constexpr int64_t kTileQueries = 64;  // these two are part of the result's definition
constexpr int64_t kTileKeys = 256;
constexpr int64_t kScorePadding = 16;  // floats between rows: of powers of two they would share cache sets

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

// Queries [begin, end) of head h against keys [first, last): those before `last` that any of them may see.
struct ScoreTile {
  int64_t b, h, begin, end, first, last;

  int64_t rows() const { return end - begin; }
  int64_t columns() const { return last - first; }
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

  int64_t tile_queries() const { return minimum(kTileQueries, queries); }
  int64_t tile_keys() const { return minimum(kTileKeys, keys); }
  int64_t score_pitch() const { return round_up(tile_keys(), 16) + kScorePadding; }
  int64_t tile_floats() const { return tile_queries() * score_pitch(); }
  // Keys that queries before `end` may see.
  int64_t visible(int64_t end) const { return causal ? minimum(keys, end) : keys; }
  int64_t group() const { return heads / key_heads; }
  int64_t query_row(int64_t b, int64_t h, int64_t i) const { return (b * heads + h) * queries + i; }
  int64_t key_row(int64_t b, int64_t h, int64_t j) const { return (b * key_heads + h / group()) * keys + j; }
  ScoreTile tile(int64_t b, int64_t h, int64_t begin, int64_t first) const {
    const int64_t end = minimum(queries, begin + kTileQueries);
    return {b, h, begin, end, first, minimum(visible(end), first + kTileKeys)};
  }
  // Columns of a tile that query i may see: the first ones.
  int64_t visible_columns(const ScoreTile& tile, int64_t i) const {
    return maximum<int64_t>(0, minimum(visible(i + 1), tile.last) - tile.first);
  }
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

inline void multiply(int64_t m, int64_t n, int64_t k, Gemm* g, bool accumulate, float* scratch) {
  g->m = m, g->n = n, g->k = k;
  g->accumulate = accumulate;
  gemm_alone(*g, scratch);
}

// Of a tile of scores, a left operand of products: where these are of 16 bits its rows are rounded first,
// each to the front of the place that it has.
constexpr int64_t kScoresPerFloat = sizeof(float) / sizeof(Element);
inline void round_scores([[maybe_unused]] float* row, [[maybe_unused]] int64_t n) {
  if constexpr (kHalfProducts) {
    Element* to = reinterpret_cast<Element*>(row);
    for (int64_t j = 0; j < n; j += W) store(to + j, load(row + j));  // whole vectors: rows are padded
  }
}
inline Elements rounded_scores(const float* tile) {
  Elements scores(tile);
  scores.dtype = kMultiplied;
  return scores;
}

// to[i, j] = q_i . k_j
inline void score_products(const Attention& a, const ScoreTile& tile, float* to, float* scratch) {
  Gemm g;
  plain(&g, a.q.from(a.query_row(tile.b, tile.h, tile.begin) * a.depth), a.depth, false,
        a.k.from(a.key_row(tile.b, tile.h, tile.first) * a.depth), a.depth, true, to, a.score_pitch());
  multiply(tile.rows(), tile.columns(), a.depth, &g, false, scratch);
}

// Masks of one row of a tile: what they make of a vector of scores, from column j on. Where a boolean one is
// false nothing is seen, another is added. Its last axis has one element, or one per key; most neighbours are
// alike, which is quicker to find than lanes are to set.
struct NoMask {
  POCKC_INLINE vf operator()(vf score, int64_t, int64_t) const { return score; }
};
template <typename T>
struct RowMask {
  const T* row;
  int64_t step;

  POCKC_INLINE vf operator()(vf score, int64_t j, int64_t valid) const {
    return masked(score, row + j * step, valid);
  }
  POCKC_INLINE vf masked(vf score, const uint8_t* keep, int64_t n) const {
    constexpr uint8_t kNoneSeen[16] = {};
    constexpr uint8_t kAllSeen[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    if (step == 0) return *keep != 0 ? score : splat(-kInfinity);
    if (n == W && std::memcmp(keep, kAllSeen, W) == 0) return score;
    if (n == W && std::memcmp(keep, kNoneSeen, W) == 0) return splat(-kInfinity);
    const vi kept = __builtin_convertvector(load_narrow<narrow_pairs>(keep, n), vi);
    return select(kept != 0, score, splat(-kInfinity));
  }
  POCKC_INLINE vf masked(vf score, const float* add, int64_t n) const {
    return score + (step == 0 ? splat(*add) : load_n(add, n));
  }
};

// Calls f with the mask of query i of a tile.
template <typename F>
POCKC_INLINE void with_mask(const Attention& a, const ScoreTile& tile, int64_t i, F&& f) {
  if (a.mask == nullptr) {
    f(NoMask());
    return;
  }
  const int64_t step = a.mask_strides[3];
  const int64_t at =
      tile.b * a.mask_strides[0] + tile.h * a.mask_strides[1] + i * a.mask_strides[2] + tile.first * step;
  if (a.mask->dtype == DType::kBool) {
    f(RowMask<uint8_t>{a.mask->as<uint8_t>() + at, step});
  } else {
    f(RowMask<float>{a.mask->as<float>() + at, step});
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_ATTENTION_H_
