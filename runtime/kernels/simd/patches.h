// The image side of an implicit-GEMM convolution: a matrix of patches that is never stored. Row m is a
// position of a grid laid over the images, column k = (tap row r, tap column s, channel c); the element is
//   image[n, gh * step_h + tap_h[r], gw * step_w + tap_w[s], c], or 0 outside of the image, m = (n, gh, gw).
// Packing copies runs of channels, and whole runs of taps where neighbouring taps are neighbours in memory.
#ifndef POCKC_SIMD_PATCHES_H_
#define POCKC_SIMD_PATCHES_H_

#include "simd/halves.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

constexpr int kMaxTaps = 32;  // per axis

struct Patches {
  const void* image = nullptr;  // at the first channel of the group
  const void* end = nullptr;    // of the whole tensor: a run may be read past its own end, not past this
  DType dtype = DType::kF32;    // of its elements: floats or halves
  int64_t height = 0, width = 0;
  int64_t pitch = 0;     // elements from one pixel to the next: all channels
  int64_t channels = 0;  // of the group
  int64_t grid_height = 0, grid_width = 0;
  int64_t step_h = 1, step_w = 1;
  int taps_h = 0, taps_w = 0;
  int64_t tap_h[kMaxTaps], tap_w[kMaxTaps];
  bool rows_join = false;  // a tap row is one run of memory where it lies inside of the image

  int64_t depth() const { return channels * taps_h * taps_w; }

  void finish() {
    rows_join = pitch == channels;
    for (int s = 1; s < taps_w; ++s) rows_join = rows_join && tap_w[s] == tap_w[s - 1] + 1;
  }
};

// A position that steps along the grid.
struct GridPosition {
  int64_t n, h, w;

  GridPosition(const Patches& p, int64_t m)
      : n(m / (p.grid_height * p.grid_width)), h(m / p.grid_width % p.grid_height), w(m % p.grid_width) {}
  POCKC_INLINE void next(const Patches& p) {
    if (++w < p.grid_width) return;
    w = 0;
    if (++h < p.grid_height) return;
    h = 0;
    ++n;
  }
};

template <typename T, typename To>
POCKC_INLINE void copy_vector(To* to, const T* from) {
  store(to, load(from));
}
template <typename T>
POCKC_INLINE void copy_vector(T* to, const T* from) {
  std::memcpy(to, from, W * sizeof(T));  // halves need not become floats
}

template <typename T, typename To>
POCKC_INLINE void copy_run(To* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) copy_vector(to + i, from + i);
  if (i < n) store_n(to + i, load_partial(from + i, n - i), n - i);
}
template <typename T>
POCKC_INLINE void zero_run(T* to, int64_t n) {
  for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA { store_n(to + i, vf{}, valid); });
}

// The same where up to W - 1 elements past the end may be overwritten: whole loads and stores are quicker
// than partial ones, and runs are short where the image has few channels. Nothing is read at or past `limit`.
constexpr int64_t kOverrun = 16;
template <typename T, typename To>
POCKC_INLINE void copy_run_loosely(To* to, const T* from, int64_t n, const T* limit) {
  int64_t i = 0;
  for (; i + W <= n; i += W) copy_vector(to + i, from + i);
  if (i == n) return;
  if (limit - (from + i) >= W) {
    copy_vector(to + i, from + i);
  } else {
    store(to + i, load_partial(from + i, n - i));
  }
}
template <typename To>
POCKC_INLINE void zero_run_loosely(To* to, int64_t n) {
  for (int64_t i = 0; i < n; i += W) store(to + i, vf{});
}

// Where a column lies: its tap row, and the place within it. The same for every patch, so found once.
struct PatchColumn {
  int64_t r, inside;

  PatchColumn(const Patches& p, int64_t k)
      : r(k / (p.channels * p.taps_w)), inside(k - r * p.channels * p.taps_w) {}
};

// `count` columns, from `first` on, of the row at `at`, of an image of T. Up to kOverrun elements past them
// are overwritten.
template <typename T, typename To>
void copy_patch_of(const Patches& p, const GridPosition& at, PatchColumn first, int64_t count, To* to) {
  const T* image = static_cast<const T*>(p.image);
  const T* image_end = static_cast<const T*>(p.end);
  const int64_t row_depth = p.channels * p.taps_w;
  const int64_t x0 = at.w * p.step_w;
  const bool joined = p.rows_join && x0 + p.tap_w[0] >= 0 && x0 + p.tap_w[p.taps_w - 1] < p.width;
  int64_t r = first.r;
  int64_t inside = first.inside;
  while (count > 0) {
    const int64_t y = at.h * p.step_h + p.tap_h[r];
    const T* line = image + (at.n * p.height + y) * p.width * p.pitch;
    const int64_t row_end = minimum(row_depth, inside + count);
    count -= row_end - inside;
    if (y < 0 || y >= p.height) {
      zero_run_loosely(to, row_end - inside);
      to += row_end - inside;
    } else if (joined) {
      copy_run_loosely(to, line + (x0 + p.tap_w[0]) * p.pitch + inside, row_end - inside, image_end);
      to += row_end - inside;
    } else {
      int64_t s = inside / p.channels;
      int64_t c = inside - s * p.channels;
      for (int64_t left = row_end - inside; left > 0; ++s, c = 0) {
        const int64_t run = minimum(left, p.channels - c);
        const int64_t x = x0 + p.tap_w[s];
        if (x < 0 || x >= p.width) {
          zero_run_loosely(to, run);
        } else {
          copy_run_loosely(to, line + x * p.pitch + c, run, image_end);
        }
        to += run;
        left -= run;
      }
    }
    inside = 0;
    ++r;
  }
}

template <typename To>
void copy_patch(const Patches& p, const GridPosition& at, PatchColumn first, int64_t count, To* to) {
  with_elements(p.dtype, [&](auto zero) { copy_patch_of<decltype(zero)>(p, at, first, count, to); });
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_PATCHES_H_
