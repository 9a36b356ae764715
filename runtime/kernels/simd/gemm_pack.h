// Blocks of B in the order in which the microkernel reads them: panels of kTileColumns columns, [k][column].
#ifndef POCKC_SIMD_GEMM_PACK_H_
#define POCKC_SIMD_GEMM_PACK_H_

#include "simd/gemm_kernel.h"
#include "simd/transpose_square.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

#if !defined(__AVX512BF16__)
// Never called: nothing else is paired.
template <typename... Arguments>
void copy_pairs(Arguments...) {}
template <typename... Arguments>
void store_pairs(Arguments...) {}
template <typename... Arguments>
void pack_transposed_pairs(Arguments...) {}
#endif

// Steps of k that are packed together, of those that are left.
POCKC_INLINE int64_t steps_together(int64_t left) { return kPaired && left > 1 ? 2 : 1; }

// The steps [k, k + valid) of up to W columns of B transposed, from n on: x[i] is step k + i, and zero in
// columns that are too many. Meanwhile the memory is asked for the columns that follow.
template <typename Rows>
POCKC_INLINE void load_square(const Rows& rows, int64_t n, int64_t k, int64_t columns, int64_t valid,
                              vf (&x)[W]) {
  if (std::is_same_v<Rows, FloatRows> && columns >= W && valid == W) {  // nothing to test at each load
    POCKC_UNROLL
    for (int i = 0; i < W; ++i) x[i] = rows.load(n + i, k, W);
  } else {
    POCKC_UNROLL
    for (int i = 0; i < W; ++i) x[i] = i < columns ? rows.load(n + i, k, valid) : vf{};
  }
  if (k % kLineFloats == 0) {
    POCKC_UNROLL
    for (int i = 0; i < W; ++i) rows.ask(n + W + i, k);
  }
  transpose_square<1>(x);
}

// One vector-wide column strip of the panel from rows of B transposed: element k0 + k of row n0 + n.
template <typename Rows>
void pack_transposed(const Rows& rows, int64_t n0, int64_t k0, int64_t depth, int64_t columns, Element* to,
                     int64_t to_stride) {
  for (int64_t k = 0; k < depth; k += W) {
    const int64_t valid = minimum<int64_t>(W, depth - k);
    vf x[W];
    load_square(rows, n0, k0 + k, columns, valid, x);
    if (valid == W) {
      POCKC_UNROLL
      for (int i = 0; i < W; ++i) store(to + (k + i) * to_stride, x[i]);
    } else {
      for (int i = 0; i < valid; ++i) store(to + (k + i) * to_stride, x[i]);
    }
  }
}

// Where row k of B begins: a stored row, and the offset into it.
struct RightRow {
  int64_t row, offset;

  POCKC_INLINE RightRow(const RightMatrix& b, int64_t k) : row(k), offset(0) {
    if (b.group_offsets == nullptr) return;
    const int64_t group = k / b.group_size;
    row = k - group * b.group_size;
    offset = b.group_offsets[group];
  }
};

inline int64_t panel_width(int64_t columns) {
  return round_up(minimum<int64_t>(columns, kTileColumns), kPanelStep);
}

// Rows of B or of a transposed A: what is asked of the memory before it is copied.
constexpr int64_t kRowsAhead = 8;
// Panels of B that are packed together: their part of a row is several cache lines, side by side.
constexpr int64_t kPanelsPacked = 64 / kTileColumns;

// `columns` columns of `steps` steps from k on, in panels of `depth` steps: put(n, valid, to) stores a vector
// of them. Up to a whole vector may be anything: those columns of C are never stored.
template <typename Put>
POCKC_INLINE void pack_steps(int64_t k, int64_t steps, int64_t depth, int64_t columns, Element* to,
                             const Put& put) {
  const int64_t whole = columns / kTileColumns * kTileColumns, width = panel_width(columns - whole);
  Element* panel = to + k * kTileColumns;
  for (int64_t n = 0; n < whole; n += kTileColumns, panel += depth * kTileColumns) {
    POCKC_UNROLL
    for (int64_t i = 0; i < kTileColumns; i += W) put(n + i, W, panel + steps * i);
  }
  if (whole == columns) return;
  panel = to + whole * depth + k * width;
  for_vectors(0, columns - whole,
              [&](int64_t i, int64_t valid) POCKC_LAMBDA { put(whole + i, valid, panel + steps * i); });
}

// `columns` of all rows of the block, of up to kPanelsPacked panels.
template <typename Rows>
void pack_panels(const Rows& shared, const RightMatrix& b, int64_t k0, int64_t depth, int64_t n0,
                 int64_t columns, Element* to) {
  const Rows rows = shared;  // what it holds stays in registers: what is written could be part of it
  for (int64_t k = 0, steps; k < depth; k += steps) {
    steps = steps_together(depth - k);
    for (int64_t ahead = k + kRowsAhead; ahead < minimum(depth, k + kRowsAhead + steps); ++ahead) {
      const RightRow later(b, k0 + ahead);
      for (int64_t n = 0; n < columns; n += kLineFloats) rows.ask(later.row, later.offset + n0 + n);
    }
    const RightRow at(b, k0 + k), next(b, k0 + k + steps - 1);
    pack_steps(k, steps, depth, columns, to, [&](int64_t n, int64_t valid, Element* line) POCKC_LAMBDA {
      const vf x = rows.load(at.row, at.offset + n0 + n, valid);
      if (kPaired && steps == 2) {
        store_pairs(line, x, rows.load(next.row, next.offset + n0 + n, valid));
      } else {
        store(line, x);
      }
    });
  }
}

// The columns [n0, n0 + columns) of the block.
template <typename Rows>
void pack_rows(const Rows& rows, const RightMatrix& b, int64_t k0, int64_t depth, int64_t n0, int64_t columns,
               Element* to) {
  const int64_t together = (b.transposed ? 1 : kPanelsPacked) * kTileColumns;
  for (int64_t n = 0; n < columns; n += together) {
    const int64_t valid = minimum(columns - n, together);
    if (!b.transposed) {
      pack_panels(rows, b, k0, depth, n0 + n, valid, to + n * depth);
      continue;
    }
    for (int64_t i = 0; i < valid; i += W) {
      if constexpr (kPaired) {
        pack_transposed_pairs(rows, n0 + n + i, k0, depth, valid - i, to + n * depth, panel_width(valid), i);
      } else {
        pack_transposed(rows, n0 + n + i, k0, depth, valid - i, to + n * depth + i, panel_width(valid));
      }
    }
  }
}

inline void pack_block(const RightMatrix& b, int64_t k0, int64_t depth, int64_t n0, int64_t columns,
                       Element* to) {
  if (b.compact.data == nullptr) {
    pack_rows(FloatRows{b.data, b.stride}, b, k0, depth, n0, columns, to);
    return;
  }
  with_compact_rows(b.compact, [&](const auto& rows) { pack_rows(rows, b, k0, depth, n0, columns, to); });
}

// Patches are written row by row, and a row spans all panels of the block.
inline void pack_patches(const Patches& patches, int64_t k0, int64_t depth, int64_t n0, int64_t columns,
                         Element* to) {
  alignas(64) Element row[2][kColumns + kOverrun];
  GridPosition at(patches, k0);
  const PatchColumn first(patches, n0);
  for (int64_t k = 0, steps; k < depth; k += steps) {
    steps = steps_together(depth - k);
    for (int64_t i = 0; i < steps; ++i, at.next(patches)) copy_patch(patches, at, first, columns, row[i]);
    pack_steps(k, steps, depth, columns, to, [&](int64_t n, int64_t, Element* line) POCKC_LAMBDA {
      if (kPaired && steps == 2) {
        copy_pairs(line, row[0] + n, row[1] + n);
      } else {
        copy_vector(line, row[0] + n);
      }
    });
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_GEMM_PACK_H_
