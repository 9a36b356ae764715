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
constexpr int kColumnVectors = 8;     // summed together: memory is read in runs of 256 bytes with AVX2
constexpr int kFewVectors = 4;        // of what is left
constexpr int64_t kColumnGroup = 64;  // columns that a thread takes at least

// The vectors of `term` from column c on, added over the rows [begin, end): of V whole ones, or of one.
template <int V, typename Term>
POCKC_INLINE void sum_vectors(int64_t begin, int64_t end, int64_t c, int64_t valid, float* out, Term&& term) {
  vf sum[V] = {};
  for (int64_t row = begin; row < end; ++row) {
    POCKC_UNROLL
    for (int j = 0; j < V; ++j) sum[j] = term(row, c + j * W, valid, sum[j]);
  }
  POCKC_UNROLL
  for (int j = 0; j < V; ++j) {
    float* to = out + c + j * W;
    store_n(to, begin == 0 ? sum[j] : load_n(to, valid) + sum[j], valid);
  }
}

// out[c0, c1): term(row, column, valid, sum) returns `sum` plus the term of that row.
template <typename Term>
void sum_columns(int64_t rows, int64_t c0, int64_t c1, float* out, Term&& term) {
  for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
    const int64_t end = minimum(rows, begin + kBlockRows);
    int64_t c = c0;
    for (; c + kColumnVectors * W <= c1; c += kColumnVectors * W)
      sum_vectors<kColumnVectors>(begin, end, c, W, out, term);
    for (; c + kFewVectors * W <= c1; c += kFewVectors * W)
      sum_vectors<kFewVectors>(begin, end, c, W, out, term);
    for (; c < c1; c += W) sum_vectors<1>(begin, end, c, minimum<int64_t>(c1 - c, W), out, term);
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_COLUMNS_H_
