// Lines of operands that are asked of the memory before they are used, a few at a time during the products
// that come before them. The pieces of a row that a block takes are too short for the hardware to run ahead,
// and lines that are asked for all at once wait for each other as long as if nobody had asked.
#ifndef POCKC_SIMD_GEMM_AHEAD_H_
#define POCKC_SIMD_GEMM_AHEAD_H_

#include "simd/simd.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

constexpr int64_t kLineFloats = 16;  // of a cache line
constexpr int64_t kAheadSteps =
    W >= 16 ? 32 : 64;  // of k, after which a tile asks again: some hundred cycles

constexpr int64_t kStepsAhead = 12;  // of k: by then a line of B has come from the second-level cache

// How often a tile asks.
inline int64_t times_asked(int64_t depth) { return divide_up(depth, kAheadSteps); }

#if defined(__clang__)
#define POCKC_KEEP_LOOP _Pragma("nounroll")
#else
#define POCKC_KEEP_LOOP _Pragma("GCC unroll 1")
#endif

class Ahead {
 public:
  Ahead() = default;
  // `pieces` rows of `floats`, asked for by so many calls.
  Ahead(const float* piece, int64_t stride, int64_t floats, int64_t pieces, int64_t times)
      : piece_(piece),
        stride_(stride),
        floats_(floats),
        pieces_(pieces),
        each_(divide_up(pieces * divide_up(floats, kLineFloats), times)) {}

  // The next call, or the next `times` calls, at once.
  POCKC_INLINE void ask(int64_t times = 1) {
    int64_t lines = times * each_;
    while (lines > 0 && pieces_ > 0) {
      int64_t at = at_;
      // Its end: a short piece often begins in a line that the piece before it has brought.
      for (; lines > 0 && at < floats_; at += kLineFloats, --lines) {
        __builtin_prefetch(piece_ + minimum(at + kLineFloats, floats_) - 1);
      }
      at_ = at;
      if (at < floats_) return;
      at_ = 0;
      piece_ += stride_;
      --pieces_;
    }
  }

 private:
  const float* piece_ = nullptr;
  int64_t stride_ = 0, floats_ = 0, pieces_ = 0, each_ = 0;
  int64_t at_ = 0;  // in the piece
};

enum Operand { kLeft, kRight, kOutput };

// What is asked for besides the product at hand. A part of every large microkernel, so the loop stays one.
struct Asked {
  Ahead of[3];  // by Operand

  POCKC_INLINE void ask(int64_t times = 1) {
    POCKC_KEEP_LOOP
    for (int i = 0; i < 3; ++i) of[i].ask(times);
  }
};

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_GEMM_AHEAD_H_
