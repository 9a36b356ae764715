// Frozen weights in fewer bytes: the layouts that runtime/FORMAT.md describes, and their plain decoder.
//
// A compact tensor has at least two axes. A row holds all elements of one index of the first axis; rows lie
// one after the other, each a whole number of 4-byte words:
//   bf16  the upper halves of the floats
//   q8    f32 scale, then an int8 code per element; element = code * scale
//   q4    a bf16 scale per group of 32 elements, filled up to a word, then 16 bytes per group: byte j has the
//   codes
//         of elements j (low half) and j + 16 (high half); element = (code - 8) * scale. The last group is
//         whole.
// Every element is one product, rounded once: all decoders give the same bits.
#ifndef POCKC_KERNELS_COMPACT_H_
#define POCKC_KERNELS_COMPACT_H_

#include <cstdint>
#include <cstring>

#include "pockc/kernel.h"

// Without linkage, because these are compiled for several instruction sets: see simd/simd.h.
#define POCKC_COMPACT_INLINE static inline __attribute__((always_inline))

namespace pockc {

constexpr int64_t kGroup = 32;  // elements of q4 that share a scale

POCKC_COMPACT_INLINE bool is_compact(DType dtype) { return dtype >= DType::kBF16 && dtype <= DType::kQ4; }

// Where the codes of a row begin.
POCKC_COMPACT_INLINE int64_t scale_bytes(DType dtype, int64_t columns) {
  if (dtype == DType::kBF16) return 0;
  if (dtype == DType::kQ8) return 4;
  return (2 * ((columns + kGroup - 1) / kGroup) + 3) / 4 * 4;
}

POCKC_COMPACT_INLINE int64_t row_bytes(DType dtype, int64_t columns) {
  int64_t codes = columns;
  if (dtype == DType::kBF16) codes = 2 * columns;
  if (dtype == DType::kQ4) codes = (columns + kGroup - 1) / kGroup * (kGroup / 2);
  return scale_bytes(dtype, columns) + (codes + 3) / 4 * 4;
}

struct CompactRows {
  const uint8_t* data = nullptr;
  DType dtype = DType::kBF16;
  int64_t columns = 0;  // elements of a row
  int64_t stride = 0;   // bytes of a row
  int64_t codes = 0;    // where they begin in a row
};

POCKC_COMPACT_INLINE CompactRows compact_rows(const Tensor& tensor) {
  CompactRows rows;
  rows.data = tensor.as<uint8_t>();
  rows.dtype = tensor.dtype;
  rows.columns = tensor.elements() / tensor.dims[0];
  rows.stride = row_bytes(tensor.dtype, rows.columns);
  rows.codes = scale_bytes(tensor.dtype, rows.columns);
  return rows;
}

POCKC_COMPACT_INLINE float bf16_at(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, sizeof(half));
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

POCKC_COMPACT_INLINE float f32_at(const uint8_t* at) {
  float value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

POCKC_COMPACT_INLINE float q4_at(const uint8_t* row, int64_t codes, int64_t column) {
  const int64_t group = column / kGroup, inside = column % kGroup;
  const int pair = row[codes + group * (kGroup / 2) + inside % (kGroup / 2)];
  const int code = inside < kGroup / 2 ? pair & 15 : pair >> 4;
  return static_cast<float>(code - 8) * bf16_at(row + 2 * group);
}

// Elements [begin, begin + count) of a row.
POCKC_COMPACT_INLINE void decode(const CompactRows& rows, int64_t row, int64_t begin, int64_t count,
                                 float* to) {
  const uint8_t* from = rows.data + row * rows.stride;
  if (rows.dtype == DType::kBF16) {
    for (int64_t i = 0; i < count; ++i) to[i] = bf16_at(from + 2 * (begin + i));
  } else if (rows.dtype == DType::kQ8) {
    const float scale = f32_at(from);
    const uint8_t* codes = from + rows.codes + begin;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(static_cast<int8_t>(codes[i])) * scale;
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = q4_at(from, rows.codes, begin + i);
  }
}

}  // namespace pockc

#endif  // POCKC_KERNELS_COMPACT_H_
