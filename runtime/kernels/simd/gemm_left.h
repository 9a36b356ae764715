// Panels of A as the microkernel reads them: where they lie, or copied, or packed. See gemm.h.
#ifndef POCKC_SIMD_GEMM_LEFT_H_
#define POCKC_SIMD_GEMM_LEFT_H_

#include "simd/gemm_kernel.h"
#include "simd/gemm_pack.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

constexpr int64_t kZeros = 1024;
alignas(64) static Element zeros[kZeros];  // rows of patches above and below the image; never written

// Whether patches can be read where they lie, but for those at the left and right border: their depth is one
// block, and the taps of a row are neighbours.
inline bool lies_in_runs(const Patches& p, int64_t depth) {
  const int64_t run = p.channels * p.taps_w, span = kTileRows * p.step_w * p.pitch + run;
  return !kHalfProducts && p.dtype == DType::kF32 && p.rows_join && depth <= kDepth && span <= kZeros;
}

// Rows in panels of nearly the same size; of patches that are read where they lie, panels that keep to a row
// of the grid where that makes them no smaller.
struct RowSplit {
  int64_t m0, m1, line, each, panels;

  RowSplit(const Gemm& gemm, int64_t m0, int64_t m1)
      : m0(m0), m1(m1), line(m1 - m0), each(divide_up(line, kTileRows)), panels(each) {
    const Patches* patches = gemm.a.patches;
    if (patches == nullptr || !lies_in_runs(*patches, gemm.k)) return;
    const int64_t width = patches->grid_width, of_line = divide_up(width, kTileRows);
    if (m0 % width != 0 || m1 % width != 0 || 5 * width < 4 * of_line * kTileRows) return;
    line = width, each = of_line, panels = (m1 - m0) / width * of_line;
  }
  POCKC_INLINE int64_t begin(int64_t panel) const {
    return m0 + panel / each * line + panel % each * line / each;
  }
};

struct LeftPanel {
  const Element* data;
  int64_t stride;
  bool row_major;
  int64_t run = 0;  // where rows lie in runs: steps of each, and where the first row has them
  const Element* runs[kMaxTaps] = {};
};

// Patches that lie in runs, if they do: those of some neighbours in a row of the grid, away from its ends,
// for a tall tile.
inline bool find_runs(const Patches& p, int64_t m0, int rows, LeftPanel* panel) {
  const GridPosition at(p, m0);
  const int64_t x = at.w * p.step_w + p.tap_w[0], last = (at.w + rows - 1) * p.step_w + p.tap_w[p.taps_w - 1];
  if (!is_tall(rows) || at.w + rows > p.grid_width || x < 0 || last >= p.width) return false;
  panel->stride = p.step_w * p.pitch;
  panel->row_major = true;
  panel->run = p.channels * p.taps_w;
  const Element* image = static_cast<const Element*>(p.image);
  for (int r = 0; r < p.taps_h; ++r) {
    const int64_t y = at.h * p.step_h + p.tap_h[r];
    const bool inside = y >= 0 && y < p.height;
    panel->runs[r] = inside ? image + ((at.n * p.height + y) * p.width + x) * p.pitch : zeros;
  }
  panel->data = panel->runs[0];
  return true;
}

// Rows that lie a multiple of 4 KiB apart share cache sets: more of them than ways would evict each other.
inline bool conflicts(int64_t stride) { return stride * sizeof(Element) % 4096 == 0; }

// Whether rows are copied before they are multiplied.
inline bool copies_rows(const LeftMatrix& a) {
  return a.patches != nullptr || is_half(a.dtype) != kHalfProducts || conflicts(a.stride);
}

template <typename T>
void copy_rows(const LeftMatrix& a, int64_t m0, int rows, int64_t k0, int64_t depth, Element* copy) {
  const T* data = static_cast<const T*>(a.data) + m0 * a.stride + k0;
  for (int i = 0; i < rows; ++i) copy_run(copy + i * (depth + kPadding), data + i * a.stride, depth);
}

inline LeftPanel prepare_left(const Gemm& gemm, int64_t m0, int rows, int64_t k0, int64_t depth,
                              Element* copy) {
  const LeftMatrix& a = gemm.a;
  const int64_t stride = depth + kPadding;
  if (a.patches != nullptr) {
    LeftPanel panel;
    if (lies_in_runs(*a.patches, gemm.k) && find_runs(*a.patches, m0, rows, &panel)) return panel;
    GridPosition at(*a.patches, m0);
    const PatchColumn first(*a.patches, k0);
    for (int i = 0; i < rows; ++i, at.next(*a.patches))
      copy_patch(*a.patches, at, first, depth, copy + i * stride);
    return {copy, stride, true};
  }
  const Element* data = static_cast<const Element*>(a.data);
  if (a.transposed) return {data + k0 * a.stride + m0, a.stride, false};
  if (!copies_rows(a)) return {data + m0 * a.stride + k0, a.stride, true};
  with_elements(a.dtype, [&](auto zero) { copy_rows<decltype(zero)>(a, m0, rows, k0, depth, copy); });
  return {copy, stride, true};
}

// Panels of a transposed A are packed, [k][kLeftPitch], unless they are used for few tiles: a step of the
// microkernel then reads one or two cache lines that follow upon those of the step before. Whole vectors are
// written, in order: what a step writes too much the next one mends, but where steps shall be paired.
constexpr int64_t kPanelWidth = (kTileRows + W - 1) / W * W;
constexpr int64_t kLeftPitch = kPaired ? kPanelWidth : kTileRows;
constexpr int64_t kMostPanels = kMostRows / kTileRows;

// Elements from row to row of a packed panel, or from step to step; and from panel to panel, padded for what
// the last step writes too much, and so that panels do not share cache sets.
#if defined(__AMX_BF16__)
inline int64_t packed_stride(int64_t depth) { return round_up(depth, 2) + kAmxPadding; }
inline int64_t panel_pitch(int64_t depth) { return kTileRows * packed_stride(depth); }
constexpr const auto& kPackedKernels = kRowMajorKernels;
#else
inline int64_t packed_stride(int64_t) { return kLeftPitch; }
inline int64_t panel_pitch(int64_t depth) { return round_up(depth * kLeftPitch, 16) + kPadding; }
constexpr const auto& kPackedKernels = kTransposedKernels;
#endif

inline bool is_packed(const LeftMatrix& a, int64_t columns) {
  if (!a.transposed || a.patches != nullptr) return false;
  return is_half(a.dtype) || conflicts(a.stride) || columns > 2 * kTileColumns;
}

#if defined(__AMX_BF16__)
// The panels `first` to `end` of the rows [m0, m1) of a matrix of T, row-major.
template <typename T>
void pack_left(const Gemm& gemm, const RowSplit& split, int64_t first, int64_t end, int64_t k0, int64_t depth,
               Element* packed) {
  const int64_t stride = gemm.a.stride;
  const T* data = static_cast<const T*>(gemm.a.data) + k0 * stride;
  const T* limit = data + (gemm.k - k0 - 1) * stride + gemm.m;
  for (int64_t p = first; p < end; ++p, packed += panel_pitch(depth)) {
    const T* column = data + split.begin(p);
    pack_left_rows(depth, packed, packed_stride(depth), [&](int64_t k) POCKC_LAMBDA {
      const T* line = column + k * stride;
      const T* next = k + 1 < depth ? line + stride : line;
      __builtin_prefetch(line + minimum(kRowsAhead, depth - 1 - k) * stride);
      if (limit - next >= W) return both(line, next);
      return both(load_n(line, minimum<int64_t>(limit - line, W)), load_n(next, limit - next));
    });
  }
}
#else
// W elements of one row of A, or pairs of two.
template <typename T>
POCKC_INLINE void pack_vector(const T* line, const T* next, int64_t steps, Element* to) {
  if (kPaired && steps == 2) {
    copy_pairs(to, line, next);
  } else {
    copy_vector(to, line);
  }
}
// The same where the matrix may end at `limit`, with zeros beyond.
template <typename T>
POCKC_INLINE void pack_last(const T* line, const T* next, int64_t steps, const T* limit, Element* to) {
  const vf x = load_n(line, maximum<int64_t>(0, minimum<int64_t>(limit - line, W)));
  if (kPaired && steps == 2) {
    store_pairs(to, x, load_n(next, maximum<int64_t>(0, minimum<int64_t>(limit - next, W))));
  } else {
    store(to, x);
  }
}

// `count` steps of a panel: put(line, next, steps, to) packs W elements of one or two rows.
template <typename T, typename Put>
POCKC_INLINE void pack_panel_steps(const T* line, int64_t stride, int64_t count, Element* to,
                                   const Put& put) {
  for (int64_t k = 0, steps; k < count; k += steps, line += steps * stride, to += steps * kLeftPitch) {
    steps = steps_together(count - k);
    const T* next = line + (steps - 1) * stride;
    POCKC_UNROLL
    for (int64_t i = 0; i < kPanelWidth; i += W) put(line + i, next + i, steps, to + steps * i);
  }
}

constexpr int64_t kStepsPacked = 32;  // of one panel, before the same of the next

// The panels `first` to `end` of the rows [m0, m1) of a matrix of T: as many together as there is scratch
// memory for, because a step of k is a few cache lines, of which a panel alone would use a part.
template <typename T>
void pack_left(const Gemm& gemm, const RowSplit& split, int64_t first, int64_t end, int64_t k0, int64_t depth,
               Element* packed) {
  const int64_t stride = gemm.a.stride, row = split.begin(first);
  // Whole vectors where the matrix goes on: what lies beyond the rows of a panel is never used.
  const T* data = static_cast<const T*>(gemm.a.data);
  const T* limit = data + (gemm.k - 1) * stride + gemm.m;
  const int64_t span = split.begin(end - 1) + kPanelWidth - row;
  for (int64_t k = 0; k < depth; k += kStepsPacked) {
    const int64_t count = minimum(kStepsPacked, depth - k), later = minimum(kStepsPacked, depth - k - count);
    const T* lines = data + (k0 + k) * stride;
    const bool inside = limit - (lines + (count - 1) * stride + row) >= span;
    for (int64_t i = 0; i < later; ++i) {
      for (int64_t j = 0; j < span; j += kLineFloats)
        __builtin_prefetch(lines + (count + i) * stride + row + j);
    }
    Element* to = packed + k * kLeftPitch;
    for (int64_t p = first; p < end; ++p, to += panel_pitch(depth)) {
      const T* line = lines + split.begin(p);
      if (inside) {
        pack_panel_steps(line, stride, count, to, pack_vector<T>);
      } else {
        pack_panel_steps(line, stride, count, to,
                         [&](const T* at, const T* next, int64_t steps, Element* vector)
                             POCKC_LAMBDA { pack_last(at, next, steps, limit, vector); });
      }
    }
  }
}
#endif

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_GEMM_LEFT_H_
