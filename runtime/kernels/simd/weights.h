// Vectors out of the rows of a right matrix, plain, compact or of 16-bit numbers: what packing reads, so that
// no weight is ever decoded as a whole.
//
// load(row, column, n): the first n elements from there in the lower lanes of a vector; what the other lanes
// hold is not said. Nothing is read outside of the row. ask(row, column) brings the cache line of an element;
// the row need not exist. One multiplication per element, as in compact.h: the same bits for every
// instruction set.
#ifndef POCKC_SIMD_WEIGHTS_H_
#define POCKC_SIMD_WEIGHTS_H_

#include "compact.h"
#include "simd/halves.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

typedef int8_t narrow_codes __attribute__((vector_size(W)));
typedef uint8_t narrow_pairs __attribute__((vector_size(W)));
typedef uint16_t narrow_halves __attribute__((vector_size(W * 2)));

// The first n of a vector's elements; the others are zero.
template <typename V>
POCKC_INLINE V load_narrow(const uint8_t* from, int64_t n) {
  V x = {};
  if (n == W) {
    std::memcpy(&x, from, sizeof(V));
  } else {
    std::memcpy(&x, from, static_cast<size_t>(n) * (sizeof(V) / W));
  }
  return x;
}

struct FloatRows {
  const float* data;
  int64_t stride;

  POCKC_INLINE vf load(int64_t row, int64_t column, int64_t n) const {
    return load_n(data + row * stride + column, n);
  }
  POCKC_INLINE void ask(int64_t row, int64_t column) const {
    __builtin_prefetch(data + row * stride + column);
  }
};

struct Bf16Rows {
  CompactRows rows;

  POCKC_INLINE vf load(int64_t row, int64_t column, int64_t n) const {
    const auto halves = load_narrow<narrow_halves>(rows.data + row * rows.stride + 2 * column, n);
    return float_of_bits(reinterpret_cast<vi>(__builtin_convertvector(halves, vu) << 16));
  }
  POCKC_INLINE void ask(int64_t row, int64_t column) const {
    __builtin_prefetch(rows.data + row * rows.stride + 2 * column);
  }
};

// Rows of a matrix of 16-bit numbers.
template <typename Half>
struct HalfRows {
  CompactRows rows;

  POCKC_INLINE vf load(int64_t row, int64_t column, int64_t n) const {
    return load_n(reinterpret_cast<const Half*>(rows.data + row * rows.stride) + column, n);
  }
  POCKC_INLINE void ask(int64_t row, int64_t column) const {
    __builtin_prefetch(rows.data + row * rows.stride + 2 * column);
  }
};

struct Q8Rows {
  CompactRows rows;

  POCKC_INLINE vf load(int64_t row, int64_t column, int64_t n) const {
    const uint8_t* from = rows.data + row * rows.stride;
    const vi codes = __builtin_convertvector(load_narrow<narrow_codes>(from + rows.codes + column, n), vi);
    return __builtin_convertvector(codes, vf) * splat(f32_at(from));
  }
  POCKC_INLINE void ask(int64_t row, int64_t column) const {
    __builtin_prefetch(rows.data + row * rows.stride + rows.codes + column);
  }
};

struct Q4Rows {
  CompactRows rows;

  POCKC_INLINE vf load(int64_t row, int64_t column, int64_t n) const {
    const uint8_t* from = rows.data + row * rows.stride;
    if (column % W != 0) return load_singly(from, column, n);
    // W divides half a group: the elements are in one half of W neighbouring bytes, all of which exist.
    const int64_t group = column / kGroup, inside = column % kGroup;
    const uint8_t* pairs = from + rows.codes + group * (kGroup / 2) + inside % (kGroup / 2);
    const vi both = __builtin_convertvector(load_narrow<narrow_pairs>(pairs, W), vi);
    const vi codes = inside < kGroup / 2 ? both & 15 : both >> 4;
    return __builtin_convertvector(codes - 8, vf) * splat(bf16_at(from + 2 * group));
  }

  POCKC_INLINE void ask(int64_t row, int64_t column) const {
    __builtin_prefetch(rows.data + row * rows.stride + rows.codes + column / 2);
  }

  // From the middle of a vector: the taps of a convolution begin anywhere in a row.
  POCKC_INLINE vf load_singly(const uint8_t* from, int64_t column, int64_t n) const {
    vf x = {};
    for (int64_t i = 0; i < n; ++i) x[i] = q4_at(from, rows.codes, column + i);
    return x;
  }
};

// Calls f with the rows as what they are.
template <typename F>
POCKC_INLINE void with_compact_rows(const CompactRows& rows, F&& f) {
  if (rows.dtype == DType::kBF16) {
    f(Bf16Rows{rows});
  } else if (rows.dtype == DType::kQ8) {
    f(Q8Rows{rows});
#if POCKC_HALVES
  } else if (rows.dtype == DType::kF16) {
    f(HalfRows<F16>{rows});
  } else if (rows.dtype == DType::kB16) {
    f(HalfRows<B16>{rows});
#endif
  } else {
    f(Q4Rows{rows});
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_WEIGHTS_H_
