// attention forward: a tile of queries, over the tiles of keys that it sees (attention.h). Per query the
// highest score m, the sum l of all e^(s - m), and the sum o of these times rows of v, go from tile to tile:
//   m' = max(m, s);   l' = e^(m - m') l + sum e^(s - m');   o' = e^(m - m') o + sum e^(s - m') v
// In the end out = o / l and logsumexp = m + log l. Threads take tiles of queries.
// Workspace per thread: a tile of scores, o where the output cannot hold it, and the scratch of the products.
#include "simd/attention.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

int64_t sum_floats(const Call& call, const Attention& a) {
  return is_half(call.outputs[0].dtype) ? round_up(a.tile_queries() * a.value_depth, 16) : 0;
}
int64_t thread_floats(const Call& call, const Attention& a) {
  const int64_t rows = a.tile_queries(), keys = a.tile_keys();
  const int64_t scores = part_scratch(rows, keys, a.depth, Copied::kRows);
  const int64_t sums = part_scratch(rows, a.value_depth, keys, Copied::kRows);
  return a.tile_floats() + sum_floats(call, a) + maximum(scores, sums);
}

struct Softmax {
  float most = -kInfinity, sum = 0;  // m and l
  float* out;                        // o
};

// Of a row of products, n of which the query sees: becomes e^(s - m').
template <typename Mask>
POCKC_INLINE void soften(const Attention& a, const Mask& mask, float* row, int64_t n, Softmax* softmax) {
  Lanes most = Lanes::all(softmax->most);
  for_lanes(n, [&](int lane, int64_t j, int64_t valid) POCKC_LAMBDA {
    const vf score = mask(load_n(row + j, valid) * splat(a.scale), j, valid);
    store_n(row + j, score, valid);
    most.v[lane] = larger(valid == W ? score : keep_first(score, valid, splat(-kInfinity)), most.v[lane]);
  });
  const float before = softmax->most, after = most.max();
  if (after == -kInfinity) {  // no key is visible so far
    zero_run(row, n);
    return;
  }
  const float terms = row_exponentials(row, n, after, row);
  if (before == -kInfinity) {  // o is zero, or not yet there
    softmax->most = after;
    softmax->sum = terms;
    return;
  }
  if (after == before) {
    softmax->sum += terms;
    return;
  }
  const vf factor = exponential_of_negative(splat(before - after));
  softmax->most = after;
  softmax->sum = softmax->sum * factor[0] + terms;
  for_vectors(0, a.value_depth, [&](int64_t e, int64_t valid) POCKC_LAMBDA {
    store_n(softmax->out + e, load_n(softmax->out + e, valid) * factor, valid);
  });
}

void add_tile(const Attention& a, const ScoreTile& tile, float* scores, Softmax* softmax, float* scratch) {
  score_products(a, tile, scores, scratch);
  for (int64_t i = tile.begin; i < tile.end; ++i) {
    float* row = scores + (i - tile.begin) * a.score_pitch();
    const int64_t seen = a.visible_columns(tile, i);
    with_mask(a, tile, i,
              [&](const auto& mask) POCKC_LAMBDA { soften(a, mask, row, seen, softmax + (i - tile.begin)); });
    zero_run(row + seen, tile.columns() - seen);
    round_scores(row, tile.columns());
  }
  Gemm g;
  plain(&g, rounded_scores(scores), kScoresPerFloat * a.score_pitch(), false,
        a.v.from(a.key_row(tile.b, tile.h, tile.first) * a.value_depth), a.value_depth, false, softmax[0].out,
        a.value_depth);
  multiply(tile.rows(), a.value_depth, tile.columns(), &g, tile.first > 0, scratch);  // the first tile sets o
}

// A query that sees no key has out = 0.
template <typename T>
void finish(const Softmax& softmax, int64_t width, T* out, float* log_sum) {
  const bool blind = softmax.most == -kInfinity;
  *log_sum = blind ? -kInfinity : softmax.most + scalar_log(softmax.sum);
  const vf factor = splat(blind ? 0.0f : 1.0f / softmax.sum);
  for_vectors(0, width, [&](int64_t e, int64_t valid) POCKC_LAMBDA {
    store_n(out + e, load_n(softmax.out + e, valid) * factor, valid);
  });
}

void run_queries(const Call& call, const Attention& a, int64_t head, int64_t begin, float* scores) {
  const int64_t b = head / a.heads, h = head % a.heads, end = minimum(a.queries, begin + kTileQueries);
  const int64_t row = a.query_row(b, h, begin), width = a.value_depth;
  const Tensor& out = call.outputs[0];
  float* log_sums = call.outputs[1].as<float>() + row;
  float* scratch = scores + a.tile_floats();
  float* sums = is_half(out.dtype) ? scratch : out.as<float>() + row * width;
  Softmax softmax[kTileQueries];
  for (int64_t i = 0; i < end - begin; ++i) softmax[i].out = sums + i * width;
  for (int64_t first = 0; first < a.visible(end); first += kTileKeys) {
    add_tile(a, a.tile(b, h, begin, first), scores, softmax, scratch + sum_floats(call, a));
  }
  with_elements(out.dtype, [&](auto zero) {
    auto* to = out.as<decltype(zero)>() + row * width;
    for (int64_t i = 0; i < end - begin; ++i) finish(softmax[i], width, to + i * width, log_sums + i);
  });
}

}  // namespace

bool accepts_attention(const Call& call) {
  if (!is_multiplied(call.inputs[0].dtype)) return false;
  if (elements(call.outputs[0]) == 0 || elements(call.inputs[1]) == 0) return false;
  return has_workspace(call, thread_floats(call, Attention(call, 0, 3)));
}

Status run_attention(const Call& call) {
  const Attention a(call, 0, 3);
  const int64_t tiles = divide_up(a.queries, kTileQueries);
  parallel(call, a.batch * a.heads * tiles, 1, [&](int64_t first, int64_t last, int thread) {
    float* scores = workspace(call) + thread * thread_floats(call, a);
    for (int64_t unit = first; unit < last; ++unit) {
      run_queries(call, a, unit / tiles, unit % tiles * kTileQueries, scores);
    }
  });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
