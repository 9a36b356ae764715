// The loops around the microkernel: see gemm.h.
#include "simd/gemm.h"

#include "simd/gemm_few.h"
#include "simd/gemm_kernel.h"
#include "simd/gemm_left.h"
#include "simd/gemm_pack.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

struct Block {
  const Element* panel[kColumns / kTileColumns];
  int64_t stride[kColumns / kTileColumns];
};

// Where a B of floats has an element: only where panels are of floats too.
const Element* right_in_place(const RightMatrix& b, int64_t k, int64_t n) {
  return reinterpret_cast<const Element*>(b.data + k * b.stride + n);
}

void prepare_right(const Gemm& gemm, int64_t k0, int64_t depth, int64_t n0, int64_t columns, bool direct,
                   Element* packed, Block* block) {
  const int64_t whole =
      direct ? columns / kTileColumns * kTileColumns : 0;  // columns that stay where they are
  if (gemm.b.patches != nullptr) {
    pack_patches(*gemm.b.patches, k0, depth, n0, columns, packed);
  } else if (whole < columns) {
    pack_block(gemm.b, k0, depth, n0 + whole, columns - whole, packed + whole * depth);
  }
  for (int64_t n = 0, index = 0; n < columns; n += kTileColumns, ++index) {
    const bool stays = n < whole;
    block->panel[index] = stays ? right_in_place(gemm.b, k0, n0 + n) : packed + n * depth;
    block->stride[index] = stays ? gemm.b.stride : panel_width(columns - n);
  }
}

constexpr int64_t kLargeFloats = 512 * 1024;  // of a matrix that no second-level cache holds
constexpr int64_t kAheadColumns = 192;        // kDepth x as many floats are 192 KiB
constexpr int64_t kLeastTiles = 4;            // with fewer, asking takes as long as waiting

Tile first_tile(const Gemm& gemm, int64_t k0, int64_t depth) {
  Tile tile;
  tile.depth = depth;
  tile.first = k0 == 0 && !gemm.accumulate;
  tile.last = k0 + depth == gemm.k;
  tile.epilogue = &gemm.epilogue;
  return tile;
}

// From column n of a block of `columns` on, which begins at n0.
POCKC_INLINE void set_columns(const Gemm& gemm, const Block& block, int64_t n0, int64_t columns, int64_t n,
                              Tile* tile) {
  tile->b = block.panel[n / kTileColumns];
  tile->b_stride = block.stride[n / kTileColumns];
  tile->column = n0 + n - gemm.c.first_column;
  tile->bias_column = n0 + n;
  tile->columns = minimum<int64_t>(columns - n, kTileColumns);
}

// What an epilogue does to whole rows, after their last block.
void finish_rows(const Gemm& gemm, float* const* c, int64_t rows, int64_t n0, int64_t columns) {
  const Epilogue& epilogue = gemm.epilogue;
  if (epilogue.gate == nullptr && epilogue.activation <= kClip) return;
  for (int64_t i = 0; i < rows; ++i) {
    float* row = c[i] + n0 - gemm.c.first_column;
    if (epilogue.gate != nullptr) close_gate(*epilogue.gate, row, columns);
    if (epilogue.activation > kClip) activate(row, columns, static_cast<Activation>(epilogue.activation));
  }
}

// Most steps of k in a block of bfloat16. Scratch memory is planned for kDepth floats, and these take half of
// it; where rows of A are read in order, a block may be deeper still, of fewer columns.
constexpr int64_t kTransposedDepth = 2 * kDepth, kCopiedDepth = 384, kNarrowDepth = 2 * kDepth,
                  kMostDepth = 1024;
constexpr int64_t kLeastColumns = 96;  // of C, for which kMostDepth leaves a tile

int64_t deepest(const Gemm& gemm) {
  if (gemm.a.transposed && gemm.a.patches == nullptr) return kTransposedDepth;
  if (copies_rows(gemm.a)) return kCopiedDepth;
  return gemm.n >= kLeastColumns ? kMostDepth : kNarrowDepth;
}

// Steps of k that a block has, but for the last one: of bfloat16, blocks of nearly the same size.
int64_t block_depth(const Gemm& gemm) {
  if (!kPaired) return kDepth;
  return round_up(divide_up(gemm.k, divide_up(gemm.k, deepest(gemm))), 32);
}

// Columns of C that wait together to be rounded. B is packed again for each block of rows, which are more
// where columns are few; but copied rows of A are copied again for each block of columns.
int64_t sum_columns(const Gemm& gemm) { return kPaired && !copies_rows(gemm.a) ? 64 : kSumColumns; }

// Whether every tile of a C of halves can be rounded as soon as it is there.
bool rounds_tiles(const Gemm& gemm) {
  return gemm.k <= block_depth(gemm) && !gemm.accumulate && gemm.epilogue.activation <= kClip &&
         gemm.epilogue.gate == nullptr;
}

// `columns` sums as halves.
template <typename T>
POCKC_INLINE void round_row(const float* sums, T* halves, int64_t columns) {
  if (columns == kTileColumns) {
    POCKC_UNROLL
    for (int64_t i = 0; i < kTileColumns; i += W) store_n(halves + i, load(sums + i), W);
    return;
  }
  for_vectors(0, columns, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
    store_n(halves + i, load_n(sums + i, valid), valid);
  });
}

// A tile, of floats where they belong, or of halves that are rounded.
void run_tile(const Gemm& gemm, MicroKernel kernel, const Tile& tile, int rows) {
  if (!is_half(gemm.c.dtype)) {
    kernel(tile);
    return;
  }
  alignas(64) float sums[kMaxRows][kTileColumns];
  float* c[kMaxRows];
  for (int i = 0; i < rows; ++i) {
    c[i] = sums[i];
    __builtin_prefetch(reinterpret_cast<uint16_t*>(tile.c[i]) + tile.column, 1);
  }
  Tile whole = tile;
  whole.c = c;
  whole.column = 0;
  kernel(whole);
  with_elements(gemm.c.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int i = 0; i < rows; ++i)
      round_row(sums[i], reinterpret_cast<T*>(tile.c[i]) + tile.column, tile.columns);
  });
}

// Where row m of C begins, whatever its elements are.
float* row_of_any(const OutputMatrix& c, int64_t m) {
  return is_half(c.dtype) ? reinterpret_cast<float*>(output_row<uint16_t>(c, m)) : output_row(c, m);
}

void multiply_panel(const Gemm& gemm, const LeftPanel& left, const Block& block, int64_t m0, int rows,
                    int64_t k0, int64_t depth, int64_t n0, int64_t columns, Asked* asked) {
  float* c[kMaxRows];
  for (int i = 0; i < rows; ++i) c[i] = row_of_any(gemm.c, m0 + i);
  const MicroKernel* const kernels =
      left.row_major ? kRowMajorKernels.entry[rows - 1] : kTransposedKernels.entry[rows - 1];
  Tile tile = first_tile(gemm, k0, depth);
  tile.a = left.data;
  tile.a_stride = left.stride;
  if (left.run > 0) tile.runs = left.runs, tile.chunk = left.run;
  tile.c = c;
  tile.asked = asked;
  for (int64_t n = 0; n < columns; n += kTileColumns) {
    set_columns(gemm, block, n0, columns, n, &tile);
    run_tile(gemm, kernels[(tile.columns - 1) / W], tile, rows);
  }
  if (tile.last) finish_rows(gemm, c, rows, n0, columns);
}

// The packed panels `first` to `end`. Each panel of B meets all of them before the next one does: so it comes
// from the first-level cache for all but one, and what streams from the second is A, of which a tile needs
// less.
void multiply_packed(const Gemm& gemm, const Element* packed, const RowSplit& split, int64_t first,
                     int64_t end, const Block& block, int64_t k0, int64_t depth, int64_t n0, int64_t columns,
                     Asked* asked) {
  const int64_t panels = end - first, m0 = split.begin(first), rows = split.begin(end) - m0;
  const int64_t pitch = panel_pitch(depth);
  float* c[kMostRows];
  for (int64_t i = 0; i < rows; ++i) c[i] = row_of_any(gemm.c, m0 + i);
  int64_t row[kMostPanels + 1];
  for (int64_t p = 0; p <= panels; ++p) row[p] = split.begin(first + p) - m0;
  Tile tile = first_tile(gemm, k0, depth);
  tile.a_stride = packed_stride(depth);
  tile.asked = asked;
  for (int64_t n = 0; n < columns; n += kTileColumns) {
    set_columns(gemm, block, n0, columns, n, &tile);
    tile.a = packed;
    for (int64_t p = 0; p < panels; ++p, tile.a += pitch) {
      tile.c = c + row[p];
      const int tile_rows = static_cast<int>(row[p + 1] - row[p]);
      run_tile(gemm, kPackedKernels.entry[tile_rows - 1][(tile.columns - 1) / W], tile, tile_rows);
    }
  }
  if (tile.last) finish_rows(gemm, c, rows, n0, columns);
}

// Rows [row, end) of A from k0 on, or of a transposed A the parts that belong to them.
Ahead ahead_of_left(const LeftMatrix& a, int64_t row, int64_t end, int64_t k0, int64_t depth, int64_t times) {
  const int64_t each = is_half(a.dtype) ? 2 : 1, rows = end - row;  // elements in the place of a float
  const int64_t first = a.transposed ? k0 * a.stride + row : row * a.stride + k0;
  const float* data = static_cast<const float*>(a.data) + first / each;
  if (a.transposed) return {data, a.stride / each, divide_up(rows, each), depth, times};
  return {data, a.stride / each, divide_up(depth, each), rows, times};
}

// What of a block of B can be asked for: all of it, where it lies in memory as it is and is small enough to
// be in the cache together with the one before it; of a convolution's weight the rows of its first tap.
Ahead ahead_of_right(const RightMatrix& b, int64_t k0, int64_t depth, int64_t n0, int64_t columns,
                     int64_t times) {
  if (b.patches != nullptr || b.compact.data != nullptr || columns > kAheadColumns) return Ahead();
  if (b.transposed) return {b.data + n0 * b.stride + k0, b.stride, depth, columns, times};
  const RightRow first(b, k0);
  const int64_t rows = b.group_offsets == nullptr ? depth : minimum(depth, b.group_size - first.row);
  return {b.data + first.row * b.stride + first.offset + n0, b.stride, columns, rows, times};
}

// Whether A comes from the memory, as far as its size tells.
bool has_large_left(const Gemm& gemm) {
  return (gemm.a.transposed ? gemm.k : gemm.m) * gemm.a.stride >=
         kLargeFloats * (is_half(gemm.a.dtype) ? 2 : 1);
}

// Whether C goes to the memory, in rows whose sums are too short for the microkernel to ask for their lines.
bool asks_for_output(const Gemm& gemm, int64_t depth, int64_t tiles) {
  return gemm.m * gemm.n >= kLargeFloats && gemm.c.grid_width == 0 && depth < kPrefetchDepth &&
         tiles >= kLeastTiles;
}

// The part of C that belongs to a panel.
Ahead ahead_of_output(const Gemm& gemm, const RowSplit& split, int64_t panel, int64_t n0, int64_t columns,
                      int64_t times) {
  const int64_t row = split.begin(panel);
  const int64_t each = is_half(gemm.c.dtype) ? 2 : 1;  // elements in the place of a float
  const float* data = row_of_any(gemm.c, row) + (n0 - gemm.c.first_column) / each;
  return {data, gemm.c.stride / each, divide_up(columns, each), split.begin(panel + 1) - row, times};
}

// All panels of A with one block of B.
void multiply_block(const Gemm& gemm, const RowSplit& split, int64_t k0, int64_t depth, int64_t n0,
                    int64_t columns, const Block& block, Ahead right_ahead, int64_t left_elements,
                    Element* scratch) {
  const int64_t tiles = divide_up(columns, kTileColumns), times = tiles * times_asked(depth);
  const bool packed = is_packed(gemm.a, columns);
  const int64_t room = minimum(left_elements / panel_pitch(depth), kMostPanels);
  const int64_t together = packed ? room : 1;
  const bool in_place = gemm.a.patches == nullptr && is_half(gemm.a.dtype) == kPaired;
  // A transposed A that is read where it lies: its next block in depth. Otherwise the next panels, which lie
  // one behind the other where it is row-major, so that few tiles suffice to ask for them; as they do for
  // packed panels of bfloat16, which are half as many lines.
  const bool deep = in_place && gemm.a.transposed && !packed && has_large_left(gemm);
  const bool few = !gemm.a.transposed && has_large_left(gemm);
  const bool asks =
      in_place && !deep && depth >= kPrefetchDepth && (few || (packed && kPaired) || tiles >= kLeastTiles);
  const bool asks_output = !packed && asks_for_output(gemm, depth, tiles);
  Asked asked;
  asked.of[kRight] = right_ahead;
  if (deep && k0 + depth < gemm.k) {
    asked.of[kLeft] = ahead_of_left(gemm.a, split.m0, split.m1, k0 + depth,
                                    minimum(block_depth(gemm), gemm.k - k0 - depth), split.panels * times);
  }
  for (int64_t p = 0; p < split.panels; p += together) {
    const int64_t next = minimum(split.panels, p + together), after = minimum(split.panels, next + together);
    const int64_t row = split.begin(p), end = split.begin(next);
    if (!deep) asked.of[kLeft] = Ahead();
    if (asks && next < after)
      asked.of[kLeft] = ahead_of_left(gemm.a, end, split.begin(after), k0, depth, times * (next - p));
    if (packed) {
      with_elements(gemm.a.dtype,
                    [&](auto zero) { pack_left<decltype(zero)>(gemm, split, p, next, k0, depth, scratch); });
      multiply_packed(gemm, scratch, split, p, next, block, k0, depth, n0, columns, &asked);
      continue;
    }
    asked.of[kOutput] = Ahead();
    if (asks_output && next < split.panels)
      asked.of[kOutput] = ahead_of_output(gemm, split, next, n0, columns, times);
    const int rows = static_cast<int>(end - row);
    const LeftPanel left = prepare_left(gemm, row, rows, k0, depth, scratch);
    multiply_panel(gemm, left, block, row, rows, k0, depth, n0, columns, &asked);
  }
}

// Rows of A that scratch memory is for, where a thread has `rows` of them.
int64_t copied_rows(int64_t rows, Copied copied) {
  if (copied == Copied::kNo) return 0;
  return copied == Copied::kColumns && rows > 192 ? kMostRows : kMaxRows;
}

int64_t left_scratch(int64_t left_rows, int64_t k) { return left_rows * (minimum(k, kDepth) + kPadding); }

// Rows or columns are split, the longer side in tiles: the other operand is then packed by every thread,
// which costs the least where it is the small one. Not by the tile of this instruction set: the planner asks.
bool splits_rows(const Gemm& gemm) { return 2 * gemm.m >= gemm.n; }

bool is_threaded(const Gemm& gemm, int threads) {
  return threads > 1 && gemm.m * gemm.n * gemm.k >= kThreadedWork;
}

// About as many as each thread has.
int64_t rows_each(const Gemm& gemm, int threads) {
  return splits_rows(gemm) ? divide_up(gemm.m, threads) : gemm.m;
}

}  // namespace

Copied copied(const LeftMatrix& a) {
  if (a.patches == nullptr && a.transposed) return Copied::kColumns;
  return a.patches != nullptr || is_half(a.dtype) || conflicts(a.stride) ? Copied::kRows : Copied::kNo;
}

// In place, up to 512 rows x kDepth floats are read again from the second-level cache. Copying costs one
// column's worth of time per block, or more; there the limits are lower.
int64_t block_columns(int64_t rows, Copied copied) {
  if (copied != Copied::kNo) return rows <= 192 ? 192 : kColumns;
  return rows <= 64 ? 48 : rows <= 256 ? 96 : rows <= 512 ? 192 : kColumns;
}

int64_t part_scratch(int64_t rows, int64_t n, int64_t k, Copied copied, bool narrowed) {
  const int64_t columns = minimum(round_up(n, 16), block_columns(rows, copied));
  const int64_t sums = narrowed ? minimum(rows, kSumFloats / columns) * columns : 0;
  return round_up(left_scratch(copied_rows(rows, copied), k) + minimum(k, kDepth) * columns, 16) +
         round_up(sums, 16);
}

int64_t gemm_scratch(const Gemm& gemm, int threads) {
  const Copied copy = copied(gemm.a);
  const bool narrowed = is_half(gemm.c.dtype);
  int64_t most = part_scratch(gemm.m, gemm.n, gemm.k, copy, narrowed);
  if (!is_threaded(gemm, threads)) return most;
  for (int count = 2; count <= threads; ++count) {
    most = maximum(most, count * part_scratch(rows_each(gemm, count), gemm.n, gemm.k, copy, narrowed));
  }
  return most;
}

namespace {

// What a thread's scratch memory is for: see part_scratch.
struct Blocking {
  int64_t columns, left_rows;

  Blocking(const Gemm& gemm, int64_t rows)
      : columns(block_columns(rows, copied(gemm.a))), left_rows(copied_rows(rows, copied(gemm.a))) {}
  // Columns that are taken at a time, of so many: blocks of nearly the same size.
  int64_t step(const Gemm& gemm, int64_t count, int64_t depth) const {
    int64_t most = columns;
    if (kPaired)
      most = minimum(columns, 2 * minimum(gemm.k, kDepth) * minimum(round_up(gemm.n, 16), columns) / depth);
    most = maximum<int64_t>(most / kTileColumns * kTileColumns, kTileColumns);
    return round_up(divide_up(count, divide_up(count, most)), kTileColumns);
  }
};

// A part of a C of floats, or of halves whose tiles are rounded.
void multiply_part(const Gemm& gemm, int64_t m0, int64_t m1, int64_t n0, int64_t n1, const Blocking& blocking,
                   float* scratch) {
  if (is_few(gemm, m1 - m0)) {
    float* c[kFewRows];
    for (int64_t m = m0; m < m1; ++m) c[m - m0] = output_row(gemm.c, m);
    multiply_few(gemm, m0, m1, n0, n1);
    finish_rows(gemm, c, m1 - m0, n0, n1 - n0);
    return;
  }
  const RowSplit split(gemm, m0, m1);
  // Few rows: B is used so seldom that copying it does not pay, and the weights are streamed once.
  const bool direct = !kHalfProducts && split.panels <= 2 && !gemm.b.transposed &&
                      gemm.b.patches == nullptr && gemm.b.group_offsets == nullptr &&
                      gemm.b.compact.data == nullptr;
  const int64_t most_depth = block_depth(gemm), step = blocking.step(gemm, n1 - n0, most_depth);
  const int64_t left_elements = left_scratch(blocking.left_rows, gemm.k) * (kHalfProducts ? 2 : 1);
  // Panels of halves take half of the scratch memory that is planned for panels of floats.
  Element* const left = reinterpret_cast<Element*>(scratch);
  Element* const packed = reinterpret_cast<Element*>(scratch + left_scratch(blocking.left_rows, gemm.k));
  for (int64_t n = n0; n < n1; n += step) {
    const int64_t columns = minimum(step, n1 - n);
    for (int64_t k = 0; k < gemm.k; k += most_depth) {
      const int64_t depth = minimum(most_depth, gemm.k - k);
      Block panel;
      prepare_right(gemm, k, depth, n, columns, direct, packed, &panel);
      const bool deeper = k + depth < gemm.k;  // else the next columns follow
      const int64_t next_k = deeper ? k + depth : 0, next_n = deeper ? n : n + columns;
      Ahead right_ahead;
      if (next_n < n1 && split.panels > 1) {
        const int64_t times = split.panels * divide_up(columns, kTileColumns) * times_asked(depth);
        right_ahead = ahead_of_right(gemm.b, next_k, minimum(most_depth, gemm.k - next_k), next_n,
                                     minimum(step, n1 - next_n), times);
      }
      multiply_block(gemm, split, k, depth, n, columns, panel, right_ahead, left_elements, left);
    }
  }
}

// A part of a C of halves, in blocks of floats that are then rounded: there is room for `most_rows` of these.
void multiply_narrowed(const Gemm& gemm, int64_t m0, int64_t m1, int64_t n0, int64_t n1, int64_t most_rows,
                       const Blocking& blocking, float* scratch) {
  const int64_t planned_columns = minimum(round_up(gemm.n, 16), blocking.columns);
  const int64_t planned = minimum(most_rows, kSumFloats / planned_columns) * planned_columns;
  const int64_t most = minimum(planned_columns, sum_columns(gemm));
  const int64_t step = most / kTileColumns > 0 ? most / kTileColumns * kTileColumns : most;
  const int64_t rows = planned / most;
  Gemm part = gemm;
  part.c = OutputMatrix();
  part.c.data = scratch;
  for (int64_t n = n0; n < n1; n += step) {
    const int64_t columns = minimum(step, n1 - n);
    part.c.first_column = n;
    part.c.stride = columns;
    for (int64_t m = m0; m < m1; m += rows) {
      const int64_t end = minimum(m1, m + rows);
      part.c.first_row = m;
      multiply_part(part, m, end, n, n + columns, blocking, scratch + round_up(planned, 16));
      with_elements(gemm.c.dtype, [&](auto zero) {
        using T = decltype(zero);
        for (int64_t i = m; i < end; ++i)
          round_row(output_row(part.c, i), output_row<T>(gemm.c, i) + n, columns);
      });
    }
  }
}

// The part [m0, m1) x [n0, n1) of C, on this thread. Scratch memory is for parts of that many rows; a part
// may have some more, because threads share whole tiles.
void gemm_part(const Gemm& gemm, int64_t m0, int64_t m1, int64_t n0, int64_t n1, int64_t rows,
               float* scratch) {
  if (m0 == m1 || n0 == n1) return;
  const Blocking blocking(gemm, rows);
  if (is_half(gemm.c.dtype) && (m1 - m0 <= kFewRows || !rounds_tiles(gemm))) {
    multiply_narrowed(gemm, m0, m1, n0, n1, rows, blocking, scratch);
  } else {
    multiply_part(gemm, m0, m1, n0, n1, blocking, scratch);
  }
  release_tiles();
}

}  // namespace

void gemm_alone(const Gemm& gemm, float* scratch) { gemm_part(gemm, 0, gemm.m, 0, gemm.n, gemm.m, scratch); }

void gemm_parallel(const Call& call, const Gemm& gemm, float* scratch) {
  const int threads = thread_count(call);
  if (!is_threaded(gemm, threads)) {
    gemm_alone(gemm, scratch);
    return;
  }
  const int64_t rows = rows_each(gemm, threads);
  const int64_t each = part_scratch(rows, gemm.n, gemm.k, copied(gemm.a), is_half(gemm.c.dtype));
  if (splits_rows(gemm)) {
    parallel(call, gemm.m, kTileRows, [&](int64_t begin, int64_t end, int thread) {
      gemm_part(gemm, begin, end, 0, gemm.n, rows, scratch + thread * each);
    });
  } else {
    parallel(call, gemm.n, kTileColumns, [&](int64_t begin, int64_t end, int thread) {
      gemm_part(gemm, 0, gemm.m, begin, end, rows, scratch + thread * each);
    });
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
