// Sums down the columns of a [rows, columns] matrix of terms, vectorised along a row.
//
// Order: rows are added within blocks of kBlockRows, block sums in order; so it depends on the shape alone,
// and rounding grows with kBlockRows plus the number of blocks, not with the number of rows.
#ifndef POCKC_SIMD_COLUMNS_H_
#define POCKC_SIMD_COLUMNS_H_

#include "simd/simd.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

constexpr int64_t kBlockRows = 128;
constexpr int kColumnVectors = 4;     // summed together
constexpr int64_t kColumnGroup = 64;  // columns that a thread takes at least

// out[c0, c1): term(row, column, valid, sum) returns `sum` plus the term of that row.
template <typename Term>
void sum_columns(int64_t rows, int64_t c0, int64_t c1, float* out, Term&& term) {
  for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
    const int64_t end = minimum(rows, begin + kBlockRows);
    for (int64_t c = c0; c < c1; c += kColumnVectors * W) {
      const int64_t columns = minimum<int64_t>(c1 - c, kColumnVectors * W);
      vf sum[kColumnVectors] = {};
      if (columns == kColumnVectors * W) {
        for (int64_t row = begin; row < end; ++row) {
          POCKC_UNROLL
          for (int j = 0; j < kColumnVectors; ++j)
            sum[j] = term(row, c + j * W, static_cast<int64_t>(W), sum[j]);
        }
      } else {
        for (int j = 0; j * W < columns; ++j) {
          const int64_t valid = minimum<int64_t>(W, columns - j * W);
          for (int64_t row = begin; row < end; ++row) sum[j] = term(row, c + j * W, valid, sum[j]);
        }
      }
      for (int j = 0; j * W < columns; ++j) {
        const int64_t valid = minimum<int64_t>(W, columns - j * W);
        float* to = out + c + j * W;
        store_n(to, begin == 0 ? sum[j] : load_n(to, valid) + sum[j], valid);
      }
    }
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_COLUMNS_H_
