// reduce_sum and reduce_mean over one run of neighbouring axes, sum_squares and all_finite.
//
// The tensor is [outer, length, inner]. With inner > 1 (bias gradients, spatial means) lanes are columns:
// rows are added in order within blocks of kBlockRows, block sums in order. With inner == 1 a row is summed
// by sixteen lanes in blocks of kBlockElements, block sums in order. Both depend on the shape alone.
#include "simd/attributes.h"
#include "simd/columns.h"
#include "simd/halves.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

constexpr int64_t kBlockElements = 4096;

struct Reduction {
  bool valid = false;
  int64_t outer = 1, length = 1, inner = 1;
};

Reduction describe(const Call& call) {
  Reduction r;
  const Tensor& x = call.inputs[0];
  if ((!is_f32(x) && !is_half(x.dtype)) || elements(x) == 0) return r;
  const int64_t count = call.ints[0];
  const int64_t first = call.ints[1], last = call.ints[count];
  // Axes between that are not reduced must have one element.
  int64_t next = 1;
  for (int64_t axis = 0; axis < x.rank; ++axis) {
    const bool reduced = next <= count && call.ints[next] == axis;
    if (reduced) ++next;
    if (axis < first) {
      r.outer *= x.dims[axis];
    } else if (axis > last) {
      r.inner *= x.dims[axis];
    } else {
      if (!reduced && x.dims[axis] != 1) return r;
      r.length *= x.dims[axis];
    }
  }
  r.valid = true;
  return r;
}

template <typename T, typename F>
POCKC_INLINE float sum_row(const T* x, int64_t n, F term) {
  float total = 0;
  for (int64_t i = 0; i < n; i += kBlockElements) {
    Lanes sum = Lanes::all(0);
    const T* block = x + i;
    for_lanes(minimum(kBlockElements, n - i), [&](int j, int64_t at, int64_t valid) POCKC_LAMBDA {
      sum.v[j] = term(load_n(block + at, valid), sum.v[j]);
    });
    total += sum.sum();
  }
  return total;
}

template <typename T>
Status reduce_of(const Call& call, bool mean) {
  const Reduction r = describe(call);
  const T* x = call.inputs[0].as<T>();
  float* out = call.outputs[0].as<float>();
  const float divisor = mean ? static_cast<float>(r.length) : 1.0f;
  if (r.inner == 1) {
    parallel(
        call, r.outer, maximum<int64_t>(1, kElementGrain / r.length), [&](int64_t begin, int64_t end, int) {
          for (int64_t row = begin; row < end; ++row) {
            out[row] =
                sum_row(x + row * r.length, r.length, [](vf v, vf sum) POCKC_LAMBDA { return sum + v; }) /
                divisor;
          }
        });
    return PK_OK;
  }
  const int64_t groups = divide_up(r.inner, kColumnGroup);
  const int64_t grain = maximum<int64_t>(1, kElementGrain / (r.length * minimum(r.inner, kColumnGroup)));
  parallel(call, r.outer * groups, grain, [&](int64_t begin, int64_t end, int) {
    // A range of groups of one matrix is walked together: memory is then read in longer runs.
    for (int64_t unit = begin; unit < end;) {
      const int64_t o = unit / groups;
      const int64_t stop = minimum(end, (o + 1) * groups);
      const int64_t c0 = (unit - o * groups) * kColumnGroup;
      const int64_t c1 = minimum(r.inner, (stop - o * groups) * kColumnGroup);
      const T* matrix = x + o * r.length * r.inner;
      float* sums = out + o * r.inner;
      sum_columns(r.length, c0, c1, sums, [&](int64_t row, int64_t c, int64_t valid, vf sum) POCKC_LAMBDA {
        return sum + load_n(matrix + row * r.inner + c, valid);
      });
      if (mean) {
        for_vectors(c0, c1, [&](int64_t c, int64_t valid) POCKC_LAMBDA {
          store_n(sums + c, load_n(sums + c, valid) / splat(divisor), valid);
        });
      }
      unit = stop;
    }
  });
  return PK_OK;
}

Status reduce(const Call& call, bool mean) {
  return with_elements(call.inputs[0].dtype,
                       [&](auto zero) { return reduce_of<decltype(zero)>(call, mean); });
}

}  // namespace

bool accepts_reduce_sum(const Call& call) { return describe(call).valid; }
Status run_reduce_sum(const Call& call) { return reduce(call, false); }
bool accepts_reduce_mean(const Call& call) { return describe(call).valid; }
Status run_reduce_mean(const Call& call) { return reduce(call, true); }

bool accepts_sum_squares(const Call& call) { return is_f32(call.inputs[0]); }
Status run_sum_squares(const Call& call) {
  *call.outputs[0].as<float>() = sum_row(call.inputs[0].as<float>(), elements(call.inputs[0]),
                                         [](vf v, vf sum) POCKC_LAMBDA { return fma(v, v, sum); });
  return PK_OK;
}

// 0 * v is 0 where v is finite and NaN elsewhere, and a sum with NaN stays NaN.
bool accepts_all_finite(const Call& call) { return is_f32(call.inputs[0]); }
Status run_all_finite(const Call& call) {
  bool finite = true;
  for (int i = 0; i < call.input_count && finite; ++i) {
    finite = sum_row(call.inputs[i].as<float>(), elements(call.inputs[i]),
                     [](vf v, vf sum) POCKC_LAMBDA { return fma(v, splat(0.0f), sum); }) == 0;
  }
  *call.outputs[0].as<uint8_t>() = finite ? 1 : 0;
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
