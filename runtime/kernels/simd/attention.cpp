// attention forward, one block of query rows at a time (attention.h). Threads take blocks.
// Workspace per thread: block_rows x score_pitch floats and the scratch of the two products.
#include "simd/attention.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

int64_t product_scratch(const Attention& a) {
  const int64_t rows = a.block_rows();
  return maximum(part_scratch(rows, a.keys, a.depth, Copied::kRows),
                 part_scratch(rows, a.value_depth, a.keys, Copied::kRows));
}
int64_t thread_floats(const Attention& a) { return a.block_rows() * a.score_pitch() + product_scratch(a); }

void run_block(const Call& call, const Attention& a, int64_t head, int64_t begin, int64_t end,
               float* scores) {
  const int64_t b = head / a.heads, h = head % a.heads;
  const int64_t seen = a.visible(end);
  float* scratch = scores + a.block_rows() * a.score_pitch();
  float* log_sums = call.outputs[1].as<float>() + head * a.queries;
  a.scores(b, h, begin, end, scores, scratch);
  for (int64_t i = begin; i < end; ++i) {
    float* row = scores + (i - begin) * a.score_pitch();
    const float most = row_max(row, seen);
    if (most == -kInfinity) {  // no key is visible
      zero_run(row, seen);
      log_sums[i] = -kInfinity;
      continue;
    }
    const float sum = row_exponentials(row, seen, most, row);
    log_sums[i] = most + scalar_log(sum);
    const vf factor = splat(1.0f / sum);
    for_vectors(0, seen, [&](int64_t j, int64_t valid) POCKC_LAMBDA {
      store_n(row + j, load_n(row + j, valid) * factor, valid);
    });
  }
  Gemm g;
  g.m = end - begin, g.n = a.value_depth, g.k = seen;
  plain(&g, scores, a.score_pitch(), false, a.v + (b * a.key_heads + a.key_head(h)) * a.keys * a.value_depth,
        a.value_depth, false, call.outputs[0].as<float>() + (head * a.queries + begin) * a.value_depth,
        a.value_depth);
  gemm_alone(g, scratch);
}

}  // namespace

bool accepts_attention(const Call& call) {
  if (elements(call.outputs[0]) == 0 || elements(call.inputs[1]) == 0) return false;
  return has_workspace(call, thread_floats(Attention(call, 0, 3)));
}

Status run_attention(const Call& call) {
  const Attention a(call, 0, 3);
  const int64_t rows = a.block_rows(), blocks = divide_up(a.queries, rows);
  parallel(call, a.batch * a.heads * blocks, 1, [&](int64_t first, int64_t last, int thread) {
    float* scores = workspace(call) + thread * thread_floats(a);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t begin = unit % blocks * rows;
      run_block(call, a, unit / blocks, begin, minimum(a.queries, begin + rows), scores);
    }
  });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
