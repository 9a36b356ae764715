// matmul: one GEMM per batch item; a rank-2 b with a higher-rank a is one GEMM over all rows. A rank-2 b may
// be compact. Workspace: gemm_scratch floats, or part_scratch for each thread that takes whole items.
#include "simd/attributes.h"
#include "simd/gemm.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

struct Product {
  Gemm gemm;
  int64_t batch = 1;
  bool flat = false;
};

Product describe(const Call& call) {
  const Tensor& a = call.inputs[0];
  const Tensor& b = call.inputs[1];
  const Tensor& out = call.outputs[0];
  Attributes attributes(call);
  Product product;
  Gemm& g = product.gemm;
  g.a.transposed = attributes.boolean();
  g.b.transposed = attributes.boolean();
  g.epilogue.activation = attributes.integer();
  g.epilogue.low = attributes.real();
  g.epilogue.high = attributes.real();
  g.m = out.dims[out.rank - 2];
  g.n = out.dims[out.rank - 1];
  g.k = a.dims[a.rank - (g.a.transposed ? 2 : 1)];
  g.a.stride = last_dim(a);
  g.c.stride = g.n;
  g.a.data = a.data;
  g.a.dtype = a.dtype;
  if (is_compact(b.dtype)) {
    g.b.compact = compact_rows(b);
  } else {
    g.b.set(b, 0, last_dim(b));
  }
  g.c.data = out.data;
  g.c.dtype = out.dtype;
  if (call.input_count > 2) g.epilogue.bias = call.inputs[2].as<float>();
  for (int i = 0; i < out.rank - 2; ++i) product.batch *= out.dims[i];
  product.flat = b.rank == 2 && a.rank == out.rank && !g.a.transposed;
  if (product.flat) {
    g.m *= product.batch;
    product.batch = 1;
  }
  return product;
}

// Which matrix of t the flat batch index of `out` reads: broadcast axes count zero.
int64_t batch_index(const Tensor& t, const Tensor& out, int64_t batch) {
  int64_t index = 0, pitch = 1;
  for (int i = 3; i <= out.rank; ++i) {
    const int64_t size = out.dims[out.rank - i];
    const int64_t at = batch % size;
    batch /= size;
    if (i > t.rank) continue;
    const int64_t own = t.dims[t.rank - i];
    if (own != 1) index += at * pitch;
    pitch *= own;
  }
  return index;
}

Gemm batch_item(const Call& call, const Product& product, int64_t batch) {
  Gemm g = product.gemm;
  const Tensor &a = call.inputs[0], &b = call.inputs[1], &out = call.outputs[0];
  g.a.data = element(a, batch_index(a, out, batch) * g.m * g.k);
  if (!is_compact(b.dtype)) g.b.set(b, batch_index(b, out, batch) * g.k * g.n, g.b.stride);
  g.c.data = element(out, batch * g.m * g.n);
  return g;
}

int64_t item_scratch(const Gemm& g) { return part_scratch(g.m, g.n, g.k, copied(g.a), is_half(g.c.dtype)); }

int64_t scratch(const Product& product, int threads) {
  const int64_t whole_items = minimum<int64_t>(threads, product.batch) * item_scratch(product.gemm);
  if (product.batch > 1 && product.batch >= threads) return whole_items;
  return maximum(whole_items, gemm_scratch(product.gemm, threads));
}

}  // namespace

bool accepts_matmul(const Call& call) {
  if (!is_multiplied(call.inputs[0].dtype)) return false;
  const Product product = describe(call);
  if (elements(call.outputs[0]) == 0 || product.gemm.k == 0) return false;
  return has_workspace(call, 0, scratch(product, thread_count(call)));
}

Status run_matmul(const Call& call) {
  const Product product = describe(call);
  if (product.batch == 1) {
    gemm_parallel(call, product.gemm, workspace(call));
    return PK_OK;
  }
  if (product.batch < thread_count(call)) {
    for (int64_t i = 0; i < product.batch; ++i)
      gemm_parallel(call, batch_item(call, product, i), workspace(call));
    return PK_OK;
  }
  const int64_t each = item_scratch(product.gemm);
  parallel(call, product.batch, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i)
      gemm_alone(batch_item(call, product, i), workspace(call) + thread * each);
  });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
