// attention forward, one block of query rows at a time (attention.h). Threads take blocks.
// Workspace per thread: block_rows x score_pitch floats and the scratch of the two products.
#include "simd/attention.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

int64_t thread_floats(const Attention& a, bool narrowed) {
  const int64_t rows = a.block_rows(), scores = part_scratch(rows, a.keys, a.depth, Copied::kRows);
  const int64_t sums = part_scratch(rows, a.value_depth, a.keys, Copied::kRows, narrowed);
  return rows * a.score_pitch() + maximum(scores, sums);
}

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
  const Tensor& out = call.outputs[0];
  plain(&g, scores, a.score_pitch(), false,
        a.v.from((b * a.key_heads + a.key_head(h)) * a.keys * a.value_depth), a.value_depth, false, nullptr,
        a.value_depth);
  g.c.data = element(out, (head * a.queries + begin) * a.value_depth);
  g.c.dtype = out.dtype;
  gemm_alone(g, scratch);
}

}  // namespace

bool accepts_attention(const Call& call) {
  if (elements(call.outputs[0]) == 0 || elements(call.inputs[1]) == 0) return false;
  return has_workspace(call, thread_floats(Attention(call, 0, 3), is_half(call.outputs[0].dtype)));
}

Status run_attention(const Call& call) {
  const Attention a(call, 0, 3);
  const int64_t rows = a.block_rows(), blocks = divide_up(a.queries, rows);
  parallel(call, a.batch * a.heads * blocks, 1, [&](int64_t first, int64_t last, int thread) {
    float* scores = workspace(call) + thread * thread_floats(a, is_half(call.outputs[0].dtype));
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t begin = unit % blocks * rows;
      run_block(call, a, unit / blocks, begin, minimum(a.queries, begin + rows), scores);
    }
  });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
