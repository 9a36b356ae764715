// attention_grad. With p = exp(s - logsumexp), recomputed per block of query rows:
//   dv += p^T ct;   dp = ct v^T;   ds = p (dp - rowsum(ct out)) scale;   dq = ds k;   dk += ds^T q
// A thread takes whole key/value heads: dk and dv then are sums over blocks (and over the query heads of a
// group) in a fixed order. Workspace per thread: two blocks of score rows and the scratch of the products.
#include "simd/attention.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

// As if every left matrix were copied, which not all are: the most that any of the products asks for.
int64_t product_scratch(const Attention& a) {
  const int64_t rows = a.block_rows(), widest = maximum(a.depth, a.value_depth);
  const int64_t scores = part_scratch(rows, a.keys, widest, Copied::kRows);
  return maximum(maximum(scores, part_scratch(rows, a.depth, a.keys, Copied::kRows)),
                 part_scratch(a.keys, widest, rows, Copied::kColumns));
}
int64_t thread_floats(const Attention& a) {
  return 2 * a.block_rows() * a.score_pitch() + product_scratch(a);
}

struct Head {
  int64_t b, h;
  Elements ct, q, k, v, out;
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

void multiply(int64_t m, int64_t n, int64_t k, Gemm* g, bool accumulate, float* scratch) {
  g->m = m, g->n = n, g->k = k;
  g->accumulate = accumulate;
  gemm_alone(*g, scratch);
}

void run_block(const Attention& a, const Head& head, int64_t begin, int64_t end, float* p, float* scratch) {
  const int64_t seen = a.visible(end), rows = end - begin, pitch = a.score_pitch();
  const int64_t depth = a.depth, width = a.value_depth;
  float* ds = p + a.block_rows() * pitch;
  a.scores(head.b, head.h, begin, end, p, scratch);
  Gemm g;
  plain(&g, head.ct.from(begin * width), width, false, head.v, width, true, ds, pitch);
  multiply(rows, seen, width, &g, false, scratch);
  for (int64_t i = begin; i < end; ++i) {
    float* p_row = p + (i - begin) * pitch;
    float* ds_row = ds + (i - begin) * pitch;
    const float log_sum = head.log_sums[i];
    if (log_sum == -kInfinity) {  // no key is visible
      zero_run(p_row, seen);
      zero_run(ds_row, seen);
      continue;
    }
    const vf delta = splat(row_product(head.ct.from(i * width), head.out.from(i * width), width));
    for_vectors(0, seen, [&](int64_t j, int64_t valid) POCKC_LAMBDA {
      const vf probability = exponential_of_negative(load_n(p_row + j, valid) - splat(log_sum));
      store_n(p_row + j, probability, valid);
      store_n(ds_row + j, probability * (load_n(ds_row + j, valid) - delta) * splat(a.scale), valid);
    });
  }
  plain(&g, p, pitch, true, head.ct.from(begin * width), width, false, head.dv, width);
  multiply(seen, width, rows, &g, true, scratch);
  plain(&g, ds, pitch, false, head.k, depth, false, head.dq + begin * depth, depth);
  multiply(rows, depth, seen, &g, false, scratch);
  plain(&g, ds, pitch, true, head.q.from(begin * depth), depth, false, head.dk, depth);
  multiply(seen, depth, rows, &g, true, scratch);
}

Head head_of(const Call& call, const Attention& a, int64_t b, int64_t h) {
  const int64_t query_head = b * a.heads + h, key_head = b * a.key_heads + a.key_head(h);
  const int64_t queries = query_head * a.queries, keys = key_head * a.keys;
  Head head;
  head.b = b, head.h = h;
  head.ct = Elements(call.inputs[0]).from(queries * a.value_depth);
  head.q = a.q.from(queries * a.depth);
  head.k = a.k.from(keys * a.depth);
  head.v = a.v.from(keys * a.value_depth);
  head.out = Elements(call.inputs[4]).from(queries * a.value_depth);
  head.log_sums = call.inputs[5].as<float>() + queries;
  head.dq = call.outputs[0].as<float>() + queries * a.depth;
  head.dk = call.outputs[1].as<float>() + keys * a.depth;
  head.dv = call.outputs[2].as<float>() + keys * a.value_depth;
  return head;
}

}  // namespace

bool accepts_attention_grad(const Call& call) {
  if (elements(call.inputs[0]) == 0 || elements(call.inputs[2]) == 0) return false;
  if (call.inputs[0].dtype != call.inputs[4].dtype) return false;
  return has_workspace(call, thread_floats(Attention(call, 1, 6)));
}

Status run_attention_grad(const Call& call) {
  const Attention a(call, 1, 6);
  const int64_t rows = a.block_rows(), group = a.heads / a.key_heads;
  parallel(call, a.batch * a.key_heads, 1, [&](int64_t first, int64_t last, int thread) {
    float* p = workspace(call) + thread * thread_floats(a);
    float* scratch = p + 2 * rows * a.score_pitch();
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t b = unit / a.key_heads, key_head = unit % a.key_heads;
      for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h) {
        const Head head = head_of(call, a, b, h);
        if (h == key_head * group) {
          zero_run(head.dk, a.keys * a.depth);
          zero_run(head.dv, a.keys * a.value_depth);
        }
        for (int64_t i = 0; i < a.queries; i += rows) {
          run_block(a, head, i, minimum(a.queries, i + rows), p, scratch);
        }
      }
    }
  });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
