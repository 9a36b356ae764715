// rotary: halves x1, x2 of the last axis. y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2; inverse (its
// transpose): y1 = x1 cos1 + x2 sin2, y2 = x2 cos2 - x1 sin1. Both halves are read before either is written.
#include "simd/attributes.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

// Offset of the table row for (b, h, t); axes of one element do not count.
int64_t table_row(const Tensor& table, int64_t b, int64_t h, int64_t t) {
  int64_t offset = 0, pitch = table.dims[3];
  const int64_t index[3] = {b, h, t};
  for (int i = 2; i >= 0; --i) {
    if (table.dims[i] != 1) offset += index[i] * pitch;
    pitch *= table.dims[i];
  }
  return offset;
}

bool fits(const Tensor& table, const Tensor& x) { return table.rank == 4 && table.dims[3] == x.dims[3]; }

}  // namespace

bool accepts_rotary(const Call& call) {
  const Tensor& x = call.inputs[0];
  return x.rank == 4 && elements(x) > 0 && fits(call.inputs[1], x) && fits(call.inputs[2], x);
}

Status run_rotary(const Call& call) {
  const bool inverse = Attributes(call).boolean();
  const Tensor& x = call.inputs[0];
  const int64_t depth = x.dims[3], half = depth / 2;
  parallel(call, elements(x) / depth, maximum<int64_t>(1, kElementGrain / depth),
           [&](int64_t begin, int64_t end, int) {
             for (int64_t row = begin; row < end; ++row) {
               const int64_t t = row % x.dims[2], h = row / x.dims[2] % x.dims[1],
                             b = row / x.dims[2] / x.dims[1];
               const float* cos = call.inputs[1].as<float>() + table_row(call.inputs[1], b, h, t);
               const float* sin = call.inputs[2].as<float>() + table_row(call.inputs[2], b, h, t);
               const float* from = x.as<float>() + row * depth;
               float* to = call.outputs[0].as<float>() + row * depth;
               for_vectors(0, half, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
                 const vf x1 = load_n(from + i, valid), x2 = load_n(from + half + i, valid);
                 const vf sin1 = load_n(sin + i, valid), sin2 = load_n(sin + half + i, valid);
                 const vf a1 = x1 * load_n(cos + i, valid), a2 = x2 * load_n(cos + half + i, valid);
                 store_n(to + i, inverse ? fma(x2, sin2, a1) : fma(-x2, sin1, a1), valid);
                 store_n(to + half + i, inverse ? fma(-x1, sin1, a2) : fma(x1, sin2, a2), valid);
               });
             }
           });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
