// The instructions of AMX in plain C++, after the operations in Intel's instruction set reference. Included
// before a kernel that uses them, it takes their place: so the kernel is tested on CPUs without.
//
// What the instruction would refuse (#UD, #GP) aborts. NaN and infinity are as the host's additions make
// them.
#ifndef POCKC_TEST_EMULATED_TILES_H_
#define POCKC_TEST_EMULATED_TILES_H_

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace pockc::test {

struct TileRegister {
  int rows = 0, row_bytes = 0;  // as configured
  uint8_t bytes[16][64] = {};
};
struct TileUnit {
  TileRegister tile[8];
  int configured = 0;  // how often: for tests
};
inline thread_local TileUnit tile_unit;

inline void refuse(const char* why) {
  std::fprintf(stderr, "emulated tiles: %s\n", why);
  std::abort();
}
inline TileRegister& tile(int index) {
  TileRegister& found = tile_unit.tile[index];
  if (found.rows == 0) refuse("a tile is used that was not configured");
  return found;
}

inline void load_config(const void* memory) {
  uint8_t config[64];
  std::memcpy(config, memory, sizeof(config));
  if (config[0] != 1) refuse("the palette is not 1");
  for (int i = 1; i < 16; ++i)
    if (config[i] != 0) refuse("a reserved byte is not zero");
  for (int i = 0; i < 16; ++i) {
    const int row_bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8, rows = config[48 + i];
    if (i >= 8 && (row_bytes != 0 || rows != 0)) refuse("there are eight tiles");
    if (row_bytes > 64 || rows > 16) refuse("a tile is too large");
    if ((row_bytes == 0) != (rows == 0)) refuse("a tile has rows without columns, or columns without rows");
    if (i >= 8) continue;
    tile_unit.tile[i] = TileRegister();
    tile_unit.tile[i].rows = rows;
    tile_unit.tile[i].row_bytes = row_bytes;
  }
  ++tile_unit.configured;
}
inline void release() {
  for (TileRegister& each : tile_unit.tile) each = TileRegister();
}
inline void set_zero(int to) { std::memset(tile(to).bytes, 0, sizeof(TileRegister::bytes)); }
inline void load_tile(int to, const void* base, int64_t stride) {
  set_zero(to);
  for (int i = 0; i < tile(to).rows; ++i)
    std::memcpy(tile(to).bytes[i], static_cast<const uint8_t*>(base) + i * stride,
                static_cast<size_t>(tile(to).row_bytes));
}
inline void store_tile(int from, void* base, int64_t stride) {
  for (int i = 0; i < tile(from).rows; ++i)
    std::memcpy(static_cast<uint8_t*>(base) + i * stride, tile(from).bytes[i],
                static_cast<size_t>(tile(from).row_bytes));
}

// Subnormal numbers count as zeros.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float element(const TileRegister& from, int row, int column) {
  uint16_t bits;
  std::memcpy(&bits, from.bytes[row] + 2 * column, sizeof(bits));
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return flushed(x);
}

// The even products of a sum and the odd ones are added up apart, then to each other, then to the sum.
inline void multiply_add(int to, int left, int right) {
  TileRegister &c = tile(to), &a = tile(left), &b = tile(right);
  if (c.rows != a.rows || a.row_bytes / 4 != b.rows || b.row_bytes != c.row_bytes || a.row_bytes % 4 != 0)
    refuse("tiles do not fit together");
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      float part[2] = {0, 0}, sum;
      for (int k = 0; k < b.rows; ++k)
        for (int i = 0; i < 2; ++i)
          part[i] = flushed(std::fma(element(a, m, 2 * k + i), element(b, k, 2 * n + i), part[i]));
      std::memcpy(&sum, c.bytes[m] + 4 * n, sizeof(sum));
      sum = flushed(flushed(sum) + flushed(part[0] + part[1]));
      std::memcpy(c.bytes[m] + 4 * n, &sum, sizeof(sum));
    }
  }
}

}  // namespace pockc::test

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig ::pockc::test::load_config
#define _tile_release ::pockc::test::release
#define _tile_zero ::pockc::test::set_zero
#define _tile_loadd ::pockc::test::load_tile
#define _tile_stored ::pockc::test::store_tile
#define _tile_dpbf16ps ::pockc::test::multiply_add

#endif  // POCKC_TEST_EMULATED_TILES_H_
