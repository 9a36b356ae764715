// The sums of a tile by AMX, for x86 with AMX-BF16: up to 16 x 16 sums of 32 products each, an instruction.
//
// Such an instruction takes a tile of A, up to 16 rows of 32 elements as they lie in memory, and one of B, up
// to 16 pairs of steps of 16 columns, which is what a panel of pairs is (gemm_bf16.h). Three tiles of sums
// side by side are enough that none waits for itself: an instruction takes 52 cycles and one begins every 16.
// So A is row-major here, and a transposed one is packed so. The last steps are a tile of fewer, and where
// the depth is odd, one of floats.
//
// Error: as in gemm_bf16.h. The even and the odd steps of an instruction are added up apart, and then to the
// sum.
#ifndef POCKC_SIMD_GEMM_AMX_H_
#define POCKC_SIMD_GEMM_AMX_H_

#include "simd/gemm_bf16.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

constexpr int kAmxRows = 16, kAmxVectors = 3;
constexpr int64_t kAmxDepth = 32;  // steps of k that an instruction takes

// What LDTILECFG reads. The registers: 0 to 2 sums, 3 A, 4 A's last steps, 5 and 6 B, 7 B's last steps.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileShapes(int64_t left_rows, int64_t last_pairs) {
    for (int i = 0; i < 8; ++i) {
      const bool last = i == 4 || i == 7;
      const int64_t pairs = last ? last_pairs : W, height = i <= 4 ? left_rows : pairs;
      if (pairs == 0) continue;
      rows[i] = static_cast<uint8_t>(height);
      row_bytes[i] = static_cast<uint16_t>(i == 4 ? 4 * pairs : 64);
    }
  }
};
static_assert(sizeof(TileShapes) == 64, "as the instruction reads it");

// To configure the tiles takes longer than many products: so it is done where shapes change, which in a
// product is seldom, and undone at the end of one, after which threads are changed sooner.
static thread_local int64_t shaped = 0;

inline void shape_tiles(int64_t rows, int64_t last_pairs) {
  const int64_t wanted = 16 * rows + last_pairs;
  if (wanted == shaped) return;
  const TileShapes shapes(rows, last_pairs);
  _tile_loadconfig(&shapes);
  shaped = wanted;
}
inline void release_tiles() {
  if (shaped == 0) return;
  _tile_release();
  shaped = 0;
}

// A tile of A times those of B, two registers by turns. The instructions take numbers of registers as
// literals.
#define POCKC_MULTIPLY_TILES(left, even, odd) \
  _tile_loadd(left, a, left_bytes);           \
  _tile_loadd(even, b, kRowBytes);            \
  _tile_dpbf16ps(0, left, even);              \
  if (V > 1) {                                \
    _tile_loadd(odd, b + 2 * W, kRowBytes);   \
    _tile_dpbf16ps(1, left, odd);             \
  }                                           \
  if (V > 2) {                                \
    _tile_loadd(even, b + 4 * W, kRowBytes);  \
    _tile_dpbf16ps(2, left, even);            \
  }

// sums[i][j] of `rows` rows and V vectors, over `depth` steps of k. A has its rows a_stride elements apart.
// ask(left) is called for every tile of A, with the steps that are left.
template <int V, typename Ask>
POCKC_INLINE void multiply_tiles(const B16* a, int64_t a_stride, const B16* b, int64_t depth, int rows,
                                 float (*sums)[kAmxVectors * W], const Ask& ask) {
  constexpr int64_t kRowBytes = 4 * V * W;  // of a panel of pairs
  const int64_t left_bytes = 2 * a_stride;
  shape_tiles(rows, depth % kAmxDepth / 2);
  __asm__ volatile("" ::: "memory");  // GCC does not know that the instructions read it
  _tile_zero(0);
  if (V > 1) _tile_zero(1);
  if (V > 2) _tile_zero(2);
  for (; depth >= kAmxDepth; depth -= kAmxDepth, a += kAmxDepth, b += kAmxDepth * V * W) {
    ask(depth);
    POCKC_MULTIPLY_TILES(3, 5, 6)
  }
  if (depth > 0) ask(depth);
  if (depth > 1) {
    POCKC_MULTIPLY_TILES(4, 7, 7)
  }
  constexpr int64_t kSumBytes = sizeof(float) * kAmxVectors * W;
  _tile_stored(0, sums[0], kSumBytes);
  if (V > 1) _tile_stored(1, sums[0] + W, kSumBytes);
  if (V > 2) _tile_stored(2, sums[0] + 2 * W, kSumBytes);
  __asm__ volatile("" ::: "memory");
  if (depth % 2 == 0) return;
  const B16* const last = b + (depth - 1) * V * W;
  for (int i = 0; i < rows; ++i) {
    const vf left = splat(widened(a[i * a_stride + depth - 1]));
    POCKC_UNROLL
    for (int j = 0; j < V; ++j) store(sums[i] + j * W, fma(left, load(last + j * W), load(sums[i] + j * W)));
  }
}

// Rows of a packed panel are padded, because whole vectors are written.
constexpr int64_t kAmxPadding = 2 * W;

// kAmxRows rows of a transposed A, row-major: load_steps(k) gives what they have in the steps k and
// k + 1, one after the other; the second may be beyond the depth.
template <typename Load>
POCKC_INLINE void pack_left_rows(int64_t depth, B16* to, int64_t pitch, const Load& load_steps) {
  for (int64_t k = 0; k < depth; k += 2 * W) {
    vf x[W];
    POCKC_UNROLL
    for (int i = 0; i < W; ++i) {
      x[i] = k + 2 * i < depth ? reinterpret_cast<vf>(as_pairs(load_steps(k + 2 * i))) : vf{};
    }
    transpose_square<1>(x);
    POCKC_UNROLL
    for (int i = 0; i < W; ++i) std::memcpy(to + i * pitch + k, &x[i], sizeof(vf));
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_GEMM_AMX_H_
