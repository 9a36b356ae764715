// C[m, n] = sum over k of A[m, k] B[k, n], then bias and activation: the core of matmul, convolutions and
// gradients.
//
// Blocking. A block of B of kDepth x block_columns is packed into panels as wide as the microkernel's tile;
// it stays in the second-level cache while panels of up to kMaxRows rows of A pass over it, each of which
// stays in the first level. A row-major A is read where it lies: packing it as well makes the microkernel a
// twentieth faster, and takes as long as that saves. Only image patches, but for those that lie in a few runs
// (gemm_left.h), and layouts that would fall on the same cache sets, are copied, kMaxRows rows at a time; a
// transposed A is packed, kMostRows at a time where there are many, so that whole cache lines are used. Such
// panels lie together in the second level, and each panel of B passes over all of them from the first. So the
// scratch memory is one block of B and, for such an A, a few panels of it per thread, and no matrix is ever
// packed as a whole.
//
// Latency. Copies run at the speed of the memory only if it is asked early: the pieces of a row that a block
// needs are too short for the hardware to run ahead. So packing asks for later rows, and panels of A and the
// next block of B are asked for while the ones before them are multiplied.
//
// A block of columns costs one more pass over A, from the cache as long as kDepth columns of A fit there. So
// a thread with few rows takes narrow blocks: that costs no time, and the scratch memory of a small product
// stays small. Who does how much follows from shapes and thread count alone, so that the planner knows it.
//
// 16-bit operands are converted to floats while they are copied or packed. A C of halves is rounded tile by
// tile where the sums of a tile are made at once; else it is computed in blocks of at most kSumFloats floats
// in scratch memory, which are then rounded: fewer columns of more rows, for each of which B is packed again.
//
// 16-bit products. The sets `fp16` of 64-bit ARM, `bf16` and `amx` of x86 have this file with panels of
// halves and the microkernel of gemm_half.h, gemm_bf16.h or gemm_amx.h: for an A of halves, in programs that
// ask for such arithmetic. Scratch memory is as for floats; blocks of bfloat16 are two to four times as deep,
// so that most tiles are rounded at once.
//
// Bits. Per output element: k ascending in one chain of fma within each block, blocks added in order,
// then bias. Neither tile shape nor thread count enters.
#ifndef POCKC_SIMD_GEMM_H_
#define POCKC_SIMD_GEMM_H_

#include "simd/gate.h"
#include "simd/patches.h"
#include "simd/simd.h"
#include "simd/weights.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

// What panels hold.
#if defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
using Element = F16;
constexpr DType kMultiplied = DType::kF16;
#elif defined(__AVX512BF16__)
using Element = B16;
constexpr DType kMultiplied = DType::kB16;
#else
using Element = float;
constexpr DType kMultiplied = DType::kF32;
#endif
constexpr bool kHalfProducts = kMultiplied != DType::kF32;
constexpr bool kPaired = kMultiplied == DType::kB16;  // steps of k: see gemm_bf16.h
// Whether a left operand of this dtype is multiplied here.
inline bool is_multiplied(DType left) { return !kHalfProducts || left == kMultiplied; }

constexpr int64_t kDepth = 256;                // of a block, part of the result's definition: see block_depth
constexpr int64_t kColumns = 384;              // most columns of a block: kDepth x as many floats are 384 KiB
constexpr int64_t kThreadedWork = 256 * 1024;  // multiply-adds; waking threads costs more than half of less
constexpr int kMaxRows = 16;                   // no tile has more rows
// Of a C of halves that wait to be rounded: so many floats stay in the second-level cache.
constexpr int64_t kSumFloats = 64 * 1024, kSumColumns = 256;
constexpr int64_t kMostRows = 32;  // of a transposed A are packed together
constexpr int64_t kPadding =
    16;  // floats after each copied row of A: against cache set conflicts, and for kOverrun

struct LeftMatrix {
  const void* data = nullptr;
  DType dtype = DType::kF32;  // floats, or halves, which are copied to floats before they are used
  int64_t stride = 0;
  bool transposed = false;           // (m, k) is data[m * stride + k], or data[k * stride + m]
  const Patches* patches = nullptr;  // instead of data
};

struct RightMatrix {
  const float* data = nullptr;
  int64_t stride = 0;
  bool transposed = false;           // (k, n) is data[k * stride + n], or data[n * stride + k]
  const Patches* patches = nullptr;  // instead of data: (k, n) is column n of patch k
  // Rows in groups (a convolution's weight seen from its output): row k is row (k % group_size) * stride,
  // shifted by group_offsets[k / group_size]. Null: plain.
  const int64_t* group_offsets = nullptr;
  int64_t group_size = 0;
  CompactRows compact;  // instead of data and stride, where its data is not null: decoded while B is packed

  // The matrix at element `index` of a tensor of floats or halves.
  void set(const Tensor& tensor, int64_t index, int64_t row_stride) {
    stride = row_stride;
    if (!is_half(tensor.dtype)) {
      data = static_cast<const float*>(element(tensor, index));
      return;
    }
    compact.data = static_cast<const uint8_t*>(element(tensor, index));
    compact.dtype = tensor.dtype;
    compact.stride = row_stride * element_bytes(tensor.dtype);
  }
};

struct OutputMatrix {
  void* data = nullptr;
  DType dtype =
      DType::kF32;  // floats, or halves: then sums wait in scratch memory as floats, and are rounded once
  int64_t stride = 0;
  int64_t first_row = 0, first_column = 0;  // of C, at data: where it holds a part
  // Rows on a grid of image positions (one phase of a strided convolution's input gradient): row m = (image,
  // y, x) is at image * image_pitch + y * row_pitch + x * stride. grid_width 0: plain.
  int64_t grid_height = 0, grid_width = 0;
  int64_t image_pitch = 0, row_pitch = 0;
};

// In elements from data.
inline int64_t output_offset(const OutputMatrix& c, int64_t m) {
  if (c.grid_width == 0) return (m - c.first_row) * c.stride;
  const int64_t x = m % c.grid_width;
  const int64_t y = m / c.grid_width % c.grid_height;
  return m / (c.grid_width * c.grid_height) * c.image_pitch + y * c.row_pitch + x * c.stride;
}
template <typename T = float>
T* output_row(const OutputMatrix& c, int64_t m) {
  return static_cast<T*>(c.data) + output_offset(c, m);
}

struct Epilogue {
  const float* bias = nullptr;
  int64_t activation = 0;  // Activation
  float low = 0, high = 0;
  const Gate* gate = nullptr;  // of a C of floats, instead of an activation
};

struct Gemm {
  int64_t m = 0, n = 0, k = 0;
  LeftMatrix a;
  RightMatrix b;
  OutputMatrix c;
  Epilogue epilogue;
  bool accumulate = false;  // add to C
};

// Whether panels of A are copied to scratch memory before they are used: one by one, or in groups.
enum class Copied { kNo, kRows, kColumns };
Copied copied(const LeftMatrix& a);
// Columns of one block where a thread has that many rows.
int64_t block_columns(int64_t rows, Copied copied);
// Scratch floats for one thread (a multiple of 16): never less for more rows, for a copied A, or for a C that
// is narrowed. This, and what follows, is the same for every instruction set.
int64_t part_scratch(int64_t rows, int64_t n, int64_t k, Copied copied, bool narrowed = false);
// Scratch floats of gemm_parallel on that many threads: never less for more of them.
int64_t gemm_scratch(const Gemm& gemm, int threads);

// All of C on this thread; needs part_scratch of all rows.
void gemm_alone(const Gemm& gemm, float* scratch);
// All of C on the call's threads.
void gemm_parallel(const Call& call, const Gemm& gemm, float* scratch);

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_GEMM_H_
