// attention_grad. With p = exp(s - logsumexp), recomputed per tile (attention.h):
//   dv += p^T ct;   dp = ct v^T;   ds = p (dp - rowsum(ct out)) scale;   dq += ds k;   dk += ds^T q
// Tiles of keys are the outer loop: k, v, dk and dv of one stay in the cache while queries pass, and all
// results are sums over tiles (dk and dv over the query heads of a group too) in a fixed order. A thread
// takes whole key/value heads. Workspace per thread: tiles of p and of ds, and the scratch of the products.
#include "simd/attention.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

// As if every left matrix were copied, which not all are: the most that any of the products asks for.
int64_t product_scratch(const Attention& a) {
  const int64_t rows = a.tile_queries(), keys = a.tile_keys(), widest = maximum(a.depth, a.value_depth);
  const int64_t scores = part_scratch(rows, keys, widest, Copied::kRows);
  return maximum(maximum(scores, part_scratch(rows, a.depth, keys, Copied::kRows)),
                 part_scratch(keys, widest, rows, Copied::kColumns));
}
int64_t thread_floats(const Attention& a) { return 2 * a.tile_floats() + product_scratch(a); }

struct Gradients {
  Elements ct, out;
  const float* log_sums;
  float *dq, *dk, *dv;
};

template <typename T>
float row_product_of(const T* x, const T* y, int64_t n) {
  Lanes sum = Lanes::all(0);
  for_lanes(n, [&](int j, int64_t i, int64_t valid)
                   POCKC_LAMBDA { sum.v[j] = fma(load_n(x + i, valid), load_n(y + i, valid), sum.v[j]); });
  return sum.sum();
}

// Of elements of one dtype.
float row_product(Elements x, Elements y, int64_t n) {
  return with_elements(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    return row_product_of(static_cast<const T*>(x.data), static_cast<const T*>(y.data), n);
  });
}

// Products of queries with keys to p, and of ct with v to ds: of a row, n of which the query sees.
template <typename Mask>
POCKC_INLINE void differentiate(const Attention& a, const Mask& mask, float log_sum, float delta, int64_t n,
                                float* p, float* ds) {
  for_vectors(0, n, [&](int64_t j, int64_t valid) POCKC_LAMBDA {
    const vf score = mask(load_n(p + j, valid) * splat(a.scale), j, valid);
    const vf probability = exponential_of_negative(score - splat(log_sum));
    store_n(p + j, probability, valid);
    store_n(ds + j, probability * (load_n(ds + j, valid) - splat(delta)) * splat(a.scale), valid);
  });
}

// The products of a tile become its p and ds.
void differentiate_tile(const Attention& a, const Gradients& gradients, const ScoreTile& tile, float* p,
                        float* ds) {
  const int64_t width = a.value_depth;
  for (int64_t i = tile.begin; i < tile.end; ++i, p += a.score_pitch(), ds += a.score_pitch()) {
    const int64_t row = a.query_row(tile.b, tile.h, i);
    const float log_sum = gradients.log_sums[row];
    const int64_t seen = log_sum == -kInfinity ? 0 : a.visible_columns(tile, i);
    const float delta = row_product(gradients.ct.from(row * width), gradients.out.from(row * width), width);
    with_mask(a, tile, i,
              [&](const auto& mask) POCKC_LAMBDA { differentiate(a, mask, log_sum, delta, seen, p, ds); });
    zero_run(p + seen, tile.columns() - seen);
    zero_run(ds + seen, tile.columns() - seen);
    round_scores(p, tile.columns());
    round_scores(ds, tile.columns());
  }
}

// If `first`, dk and dv are set, else added to.
void add_tile(const Attention& a, const Gradients& gradients, const ScoreTile& tile, bool first, float* p,
              float* scratch) {
  const int64_t rows = tile.rows(), columns = tile.columns(), pitch = kScoresPerFloat * a.score_pitch();
  const int64_t depth = a.depth, width = a.value_depth;
  const int64_t query = a.query_row(tile.b, tile.h, tile.begin), key = a.key_row(tile.b, tile.h, tile.first);
  const Elements ct = gradients.ct.from(query * width);
  float* ds = p + a.tile_floats();
  Gemm g;
  score_products(a, tile, p, scratch);
  plain(&g, ct, width, false, a.v.from(key * width), width, true, ds, a.score_pitch());
  multiply(rows, columns, width, &g, false, scratch);
  differentiate_tile(a, gradients, tile, p, ds);
  plain(&g, rounded_scores(p), pitch, true, ct, width, false, gradients.dv + key * width, width);
  multiply(columns, width, rows, &g, !first, scratch);
  plain(&g, rounded_scores(ds), pitch, false, a.k.from(key * depth), depth, false,
        gradients.dq + query * depth, depth);
  multiply(rows, depth, columns, &g, tile.first > 0, scratch);
  plain(&g, rounded_scores(ds), pitch, true, a.q.from(query * depth), depth, false,
        gradients.dk + key * depth, depth);
  multiply(columns, depth, rows, &g, !first, scratch);
}

// Of a tile of keys.
void clear_keys(const Attention& a, const Gradients& gradients, int64_t key_head, int64_t first) {
  const int64_t key = key_head * a.keys + first, count = minimum(kTileKeys, a.keys - first);
  zero_run(gradients.dk + key * a.depth, count * a.depth);
  zero_run(gradients.dv + key * a.value_depth, count * a.value_depth);
}

// What all queries that see a tile of keys give, of the heads that share these.
void add_keys(const Attention& a, const Gradients& gradients, int64_t key_head, int64_t first, float* p) {
  const int64_t b = key_head / a.key_heads, head = key_head % a.key_heads * a.group();
  const int64_t earliest = a.causal ? first / kTileQueries * kTileQueries : 0;
  // Where the first tile of queries sees all of these keys, it sets their gradients.
  if (a.causal) clear_keys(a, gradients, key_head, first);
  for (int64_t h = head; h < head + a.group(); ++h) {
    for (int64_t begin = earliest; begin < a.queries; begin += kTileQueries) {
      const bool sets = !a.causal && h == head && begin == 0;
      add_tile(a, gradients, a.tile(b, h, begin, first), sets, p, p + 2 * a.tile_floats());
    }
  }
}

}  // namespace

bool accepts_attention_grad(const Call& call) {
  if (elements(call.inputs[0]) == 0 || elements(call.inputs[2]) == 0) return false;
  if (call.inputs[0].dtype != call.inputs[4].dtype) return false;
  if (!is_multiplied(call.inputs[0].dtype) || !is_multiplied(call.inputs[1].dtype)) return false;
  return has_workspace(call, thread_floats(Attention(call, 1, 6)));
}

Status run_attention_grad(const Call& call) {
  const Attention a(call, 1, 6);
  const Gradients gradients = {Elements(call.inputs[0]),    Elements(call.inputs[4]),
                               call.inputs[5].as<float>(),  call.outputs[0].as<float>(),
                               call.outputs[1].as<float>(), call.outputs[2].as<float>()};
  parallel(call, a.batch * a.key_heads, 1, [&](int64_t unit, int64_t last, int thread) {
    float* p = workspace(call) + thread * thread_floats(a);
    for (; unit < last; ++unit) {
      for (int64_t first = 0; first < a.keys; first += kTileKeys) add_keys(a, gradients, unit, first, p);
    }
  });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
