// The microkernel: a tile of C of R rows and V vectors, all of it in registers.
//
// Per step of k: V loads of B, R broadcasts of A, R * V fma. Tile shapes use nearly all registers: AVX-512 14
// x 32 (28 sums + 2 + 1 of 32), AVX2 6 x 16 (12 + 2 + 1 of 16), NEON 8 x 12 (24 + 3 + 2 of 32), SSE2 and
// 32-bit NEON 6 x 8 (12 + 2 + 1 of 16), scalar registers of RISC-V 6 x 4 (24 + 4 + 1 of 32).
// Every row count up to the full one is compiled, so that a matrix of few rows wastes nothing and row
// remainders are spread evenly. On 64-bit ARM: gemm_lanes.h. Of halves: gemm_half.h, gemm_bf16.h, gemm_amx.h.
#ifndef POCKC_SIMD_GEMM_KERNEL_H_
#define POCKC_SIMD_GEMM_KERNEL_H_

#include "simd/gemm.h"
#include "simd/gemm_ahead.h"
#if defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
#include "simd/gemm_half.h"
#elif defined(__AMX_BF16__)
#include "simd/gemm_amx.h"
#elif defined(__AVX512BF16__)
#include "simd/gemm_bf16.h"
#elif defined(__aarch64__)
#include "simd/gemm_lanes.h"
#endif

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

#if defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
constexpr int kTileRows = 8, kTileVectors = 4;
constexpr int kPanelStep = 8;  // panels are multiples of that wide
#else
constexpr int kPanelStep = W;
#if defined(__AMX_BF16__)
constexpr int kTileRows = kAmxRows, kTileVectors = kAmxVectors;
#elif defined(__AVX512F__)
constexpr int kTileRows = 14, kTileVectors = 2;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 8, kTileVectors = 3;
#elif defined(__riscv_flen)
constexpr int kTileRows = 6, kTileVectors = 1;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif
#endif
constexpr int kTileColumns = kTileVectors * W;

static_assert(kTileRows <= kMaxRows && kColumns % kTileColumns == 0, "blocking");

struct Tile {
  const Element* a;
  int64_t a_stride;  // between rows (row-major) or between steps of k
  const Element* b;
  int64_t b_stride;
  int64_t depth;
  float* const* c;  // one pointer per row
  int64_t column;   // added to each
  int64_t columns;  // valid ones, more than (V - 1) * W
  bool first;       // overwrite C, or add to it
  bool last;        // bias and clip come after this block
  const Epilogue* epilogue;
  int64_t bias_column;
  Asked* asked;
  const Element* const* runs = nullptr;  // where A lies in runs of `chunk` steps
  int64_t chunk = kAheadSteps;
};

constexpr int64_t kPrefetchDepth = 64;  // shorter sums are done before a line of C could arrive

// Tall tiles take A in runs; large ones of wide vectors ask while they multiply, others before. More code for
// small ones would be in vain.
constexpr bool is_tall(int64_t rows) { return 3 * rows > 2 * kTileRows; }
template <int R, int V>
constexpr bool asks_within = W >= 8 && V == kTileVectors && is_tall(R);

__attribute__((noinline)) inline void ask_at_once(const Tile& t) { t.asked->ask(times_asked(t.depth)); }

// C is needed when the sums are done: by then it is here. Of a tile that streams rows of A through the cache
// it is asked for towards the end, or they would drive it out again.
template <int R, int V>
POCKC_INLINE void ask_for_output(const Tile& t) {
  POCKC_UNROLL
  for (int i = 0; i < R; ++i) {
    POCKC_UNROLL
    for (int j = 0; j < V * W; j += kLineFloats) __builtin_prefetch(t.c[i] + t.column + j, 1);
  }
}

// What follows upon the sums of R rows, from row `row` of the tile on.
template <int R, int V>
POCKC_INLINE void finish_tile_rows(const Tile& t, int row, vf (*sum)[V]) {
  const int64_t tail = t.columns - (V - 1) * W;  // lanes of the last vector
  if (!t.first) {
    POCKC_UNROLL
    for (int i = 0; i < R; ++i) {
      const float* c = t.c[row + i] + t.column;
      POCKC_UNROLL
      for (int j = 0; j < V; ++j) sum[i][j] += load_n(c + j * W, j < V - 1 ? W : tail);
    }
  }
  if (t.last && t.epilogue->bias != nullptr) {
    POCKC_UNROLL
    for (int j = 0; j < V; ++j) {
      const vf bias = load_n(t.epilogue->bias + t.bias_column + j * W, j < V - 1 ? W : tail);
      POCKC_UNROLL
      for (int i = 0; i < R; ++i) sum[i][j] += bias;
    }
  }
  if (t.last && t.epilogue->activation == kClip) {
    const vf low = splat(t.epilogue->low), high = splat(t.epilogue->high);
    POCKC_UNROLL
    for (int i = 0; i < R; ++i) {
      POCKC_UNROLL
      for (int j = 0; j < V; ++j) sum[i][j] = clip(sum[i][j], low, high);
    }
  }
  POCKC_UNROLL
  for (int i = 0; i < R; ++i) {
    float* c = t.c[row + i] + t.column;
    POCKC_UNROLL
    for (int j = 0; j < V; ++j) store_n(c + j * W, sum[i][j], j < V - 1 ? W : tail);
  }
}

#if defined(__AMX_BF16__)
template <int V>
void amx_kernel(const Tile& t, int rows, bool asks) {
  alignas(64) float sums[kTileRows][kTileColumns];
  if (!asks) ask_at_once(t);
  multiply_tiles<V>(t.a, t.a_stride, t.b, t.depth, rows, sums, [&](int64_t) POCKC_LAMBDA {
    if (asks) t.asked->ask();
  });
  for (int i = 0; i < rows; ++i) {
    vf sum[1][V];
    POCKC_UNROLL
    for (int j = 0; j < V; ++j) sum[0][j] = load(sums[i] + j * W);
    finish_tile_rows<1, V>(t, i, sum);
  }
}

template <int R, int V, bool RowMajor>
void micro_kernel(const Tile& t) {
  if (t.depth >= kPrefetchDepth) ask_for_output<R, V>(t);
  amx_kernel<V>(t, R, asks_within<R, V>);
}
#else
#if !defined(__aarch64__)
// Four steps of k at a time where one is short: less to issue besides the multiply-adds.
#if defined(__AVX512F__)
#define POCKC_UNROLL_STEPS
#elif defined(__clang__) && defined(__x86_64__)
#define POCKC_UNROLL_STEPS _Pragma("unroll 2")  // four take a tenth longer: registers are few
#elif defined(__clang__)
#define POCKC_UNROLL_STEPS _Pragma("unroll 4")
#else
#define POCKC_UNROLL_STEPS _Pragma("GCC unroll 4")
#endif

// sum[i][j] over the steps [k0, end) of k, from a and b on, which end up behind them. On 64-bit ARM:
// gemm_lanes.h.
template <int R, int V, bool RowMajor>
POCKC_INLINE void add_steps(const float*& a, int64_t a_stride, const float*& b, int64_t b_stride, int64_t k0,
                            int64_t end, vf (&sum)[R][V]) {
  POCKC_UNROLL_STEPS
  for (int64_t k = k0; k < end; ++k) {
    POCKC_UNROLL
    for (int j = 0; j < V * W; j += kLineFloats) __builtin_prefetch(b + kStepsAhead * b_stride + j);
    vf right[V];
    POCKC_UNROLL
    for (int j = 0; j < V; ++j) right[j] = load(b + j * W);
    POCKC_UNROLL
    for (int i = 0; i < R; ++i) {
      const vf left = splat(RowMajor ? a[i * a_stride] : a[i]);
      POCKC_UNROLL
      for (int j = 0; j < V; ++j) sum[i][j] = fma(left, right[j], sum[i][j]);
    }
    a += RowMajor ? 1 : a_stride;
    b += b_stride;
  }
}
#endif

template <int R, int V, bool RowMajor>
void micro_kernel(const Tile& t) {
  constexpr bool late = RowMajor && asks_within<R, V>;
  if (t.depth >= kPrefetchDepth && !late) ask_for_output<R, V>(t);
  vf sum[R][V];
#if defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
  ask_at_once(t);
  multiply_halves<R, V, RowMajor>(t.a, t.a_stride, t.b, t.depth, sum);
#elif defined(__AVX512BF16__)
  if (!asks_within<R, V>) ask_at_once(t);
  const auto ask = [&](int64_t left) POCKC_LAMBDA {
    if constexpr (asks_within<R, V>) t.asked->ask();
    if (late && left <= 2 * kAheadSteps && left > kAheadSteps) ask_for_output<R, V>(t);
  };
  multiply_pairs<R, V, RowMajor>(t.a, t.a_stride, t.b, t.depth, sum, ask);
#else
  POCKC_UNROLL
  for (int i = 0; i < R; ++i) {
    POCKC_UNROLL
    for (int j = 0; j < V; ++j) sum[i][j] = vf{};
  }
  const float* a = t.a;
  const float* b = t.b;
  const int64_t a_stride = t.a_stride;
  const int64_t b_stride = t.b_stride;
  if (!asks_within<R, V>) ask_at_once(t);
  const Element* const* runs = t.runs;
  const int64_t chunk = is_tall(R) ? t.chunk : t.depth;
  for (int64_t k0 = 0; k0 < t.depth; k0 += chunk) {
    if constexpr (asks_within<R, V>) t.asked->ask();
    if (late && k0 + 2 * chunk >= t.depth && k0 + chunk < t.depth) ask_for_output<R, V>(t);
    if (RowMajor && is_tall(R) && runs != nullptr) a = *runs++;
    add_steps<R, V, RowMajor>(a, a_stride, b, b_stride, k0, minimum(t.depth, k0 + chunk), sum);
  }
#endif
  finish_tile_rows<R, V>(t, 0, sum);
}
#endif

using MicroKernel = void (*)(const Tile&);

// table[rows - 1][vectors - 1]
template <bool RowMajor>
struct KernelTable {
  MicroKernel entry[kTileRows][kTileVectors];

  template <int R, int V>
  constexpr void fill() {
    entry[R - 1][V - 1] = micro_kernel<R, V, RowMajor>;
    if constexpr (V > 1) {
      fill<R, V - 1>();
    } else if constexpr (R > 1) {
      fill<R - 1, kTileVectors>();
    }
  }
  constexpr KernelTable() : entry() { fill<kTileRows, kTileVectors>(); }
};
constexpr KernelTable<true> kRowMajorKernels;
constexpr KernelTable<false> kTransposedKernels;
#if !defined(__AMX_BF16__)
inline void release_tiles() {}
#endif

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_GEMM_KERNEL_H_
