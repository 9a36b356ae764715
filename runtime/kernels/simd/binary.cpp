// add, sub, mul, div, maximum, minimum of floats with broadcasting.
//
// One operand has the output's shape. The other may be broadcast along one run of axes: seen from the output
// it then is [outer, 1, inner], which covers a scalar, a bias [C], a per-row factor [..., 1] and a per-image
// channel factor [N, 1, 1, C]. Anything else goes to the reference kernel. Output element i depends on the
// full operand's element i, so the output may be that operand.
#include "simd/attributes.h"
#include "simd/halves.h"
#include "simd/math.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

struct Broadcast {
  bool valid = false;
  bool left_is_full = true;
  int64_t outer = 1, middle = 1, inner = 1;
};

// t seen as [outer, 1, inner] against `out`.
bool fit_broadcast(const Tensor& t, const Tensor& out, Broadcast* b) {
  b->outer = b->middle = b->inner = 1;
  int stage = 0;  // 0: outer, 1: middle, 2: inner
  for (int i = 0; i < out.rank; ++i) {
    const int64_t size = out.dims[i];
    const int own_axis = i - (out.rank - t.rank);
    const int64_t own = own_axis < 0 ? 1 : t.dims[own_axis];
    if (size == 1) continue;
    if (own == 1 && stage == 0) stage = 1;
    if (own == 1 && stage == 2) return false;
    if (own != 1 && stage == 1) stage = 2;
    (stage == 0 ? b->outer : stage == 1 ? b->middle : b->inner) *= size;
  }
  // Without broadcast axes everything is one contiguous run.
  if (stage == 0) b->inner = b->outer, b->outer = 1;
  return true;
}

// Floats, or halves of one dtype; beside these the operand that is not full may be of floats.
bool dtypes_fit(const Call& call, int full) {
  const DType dtype = call.outputs[0].dtype;
  const Tensor& other = call.inputs[1 - full];
  return (dtype == DType::kF32 || is_half(dtype)) && call.inputs[full].dtype == dtype &&
         (other.dtype == dtype || is_f32(other));
}

Broadcast describe(const Call& call) {
  Broadcast b;
  const Tensor& out = call.outputs[0];
  if (elements(out) == 0) return b;
  if (elements(call.inputs[0]) == elements(out)) {
    b.valid = fit_broadcast(call.inputs[1], out, &b) && dtypes_fit(call, 0);
    return b;
  }
  b.left_is_full = false;
  b.valid = elements(call.inputs[1]) == elements(out) && fit_broadcast(call.inputs[0], out, &b) &&
            dtypes_fit(call, 1);
  return b;
}

// `full` and the output are of T, the other operand is of O.
template <typename T, typename O, typename F>
Status combine_of(const Call& call, const Broadcast& b, F function) {
  const T* full = call.inputs[b.left_is_full ? 0 : 1].as<T>();
  const O* other = call.inputs[b.left_is_full ? 1 : 0].as<O>();
  T* out = call.outputs[0].as<T>();
  if (b.inner == 1) {  // one factor per run of `middle` elements
    const int64_t grain = maximum<int64_t>(1, kElementGrain / b.middle);
    const int64_t parts = b.outer == 1 ? b.middle : b.outer;
    parallel(call, parts, b.outer == 1 ? kElementGrain : grain, [=](int64_t begin, int64_t end, int) {
      const bool scalar = b.outer == 1;
      for (int64_t o = scalar ? 0 : begin; o < (scalar ? 1 : end); ++o) {
        const vf factor = splat(load_n(other + o, 1)[0]);
        const int64_t first = scalar ? begin : o * b.middle;
        for_vectors(first, scalar ? end : first + b.middle, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
          store_n(out + i, function(load_n(full + i, valid), factor), valid);
        });
      }
    });
    return PK_OK;
  }
  if (b.outer * b.middle == 1) {
    parallel(call, b.inner, kElementGrain, [=](int64_t begin, int64_t end, int) {
      for_vectors(begin, end, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
        store_n(out + i, function(load_n(full + i, valid), load_n(other + i, valid)), valid);
      });
    });
    return PK_OK;
  }
  parallel(call, b.outer * b.middle, maximum<int64_t>(1, kElementGrain / b.inner),
           [=](int64_t begin, int64_t end, int) {
             for (int64_t row = begin; row < end; ++row) {
               const T* x = full + row * b.inner;
               const O* y = other + row / b.middle * b.inner;
               T* z = out + row * b.inner;
               for_vectors(0, b.inner, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
                 store_n(z + i, function(load_n(x + i, valid), load_n(y + i, valid)), valid);
               });
             }
           });
  return PK_OK;
}

template <typename F>
Status combine_full(const Call& call, const Broadcast& b, F function) {
  return with_elements(call.outputs[0].dtype, [&](auto zero) {
    using T = decltype(zero);
    if (is_f32(call.inputs[b.left_is_full ? 1 : 0])) return combine_of<T, float>(call, b, function);
    return combine_of<T, T>(call, b, function);
  });
}

template <typename F>
Status combine(const Call& call, F function) {
  const Broadcast b = describe(call);
  if (b.left_is_full) return combine_full(call, b, function);
  return combine_full(call, b, [&](vf full, vf other) POCKC_LAMBDA { return function(other, full); });
}

// NaN in either operand goes through.
POCKC_INLINE vf greater_of(vf a, vf b) {
  const vf y = a < b ? b : a;
  return select(b != b, b, y);
}
POCKC_INLINE vf lesser_of(vf a, vf b) {
  const vf y = b < a ? b : a;
  return select(b != b, b, y);
}

}  // namespace

#define POCKC_BINARY(op, expression)                                          \
  bool accepts_##op(const Call& call) { return describe(call).valid; }        \
  Status run_##op(const Call& call) {                                         \
    return combine(call, [](vf a, vf b) POCKC_LAMBDA { return expression; }); \
  }
POCKC_BINARY(add, a + b)
POCKC_BINARY(sub, a - b)
POCKC_BINARY(mul, a* b)
POCKC_BINARY(div, a / b)
POCKC_BINARY(maximum, greater_of(a, b))
POCKC_BINARY(minimum, lesser_of(a, b))

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
