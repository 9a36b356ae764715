// Products through AMX, whose instructions are emulated here: against sums of doubles, with scratch memory of
// exactly the size that was planned. The real instructions are tested under an emulator of such a CPU:
// tests/amx.
#include "emulated_tiles.h"
// After it.
#include <memory>
#include <vector>

#include "../src/cpu_features.h"
#include "check.h"
#include "simd/gemm.h"
#include "simd/halves.h"

namespace pockc::test {
namespace {

using namespace pockc::POCKC_SIMD_NAMESPACE;

struct Case {
  int64_t m, n, k;
  bool transpose_a = false, transpose_b = false;
  DType right = DType::kF32, result = DType::kF32;
  bool accumulate = false, epilogue = false;
  int64_t padding = 0;  // of the rows of A
};

// Numbers in [-1, 1): random enough, the same everywhere.
struct Numbers {
  uint32_t state = 1;
  float next() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
  }
};

B16 rounded(float x) {
  B16 half;
  pockc::narrow(x, &half);
  return half;
}
float as_half(float x) { return widened(rounded(x)); }

// Memory of exactly its size, so that a sanitizer sees every access outside; with floats or such halves.
class Matrix {
 public:
  Matrix(int64_t count, DType dtype)
      : dtype_(dtype), bytes_(static_cast<size_t>(count * element_bytes(dtype))) {}
  void fill(Numbers* numbers) {
    for (int64_t i = 0; i < count(); ++i) set(i, numbers->next());
  }
  int64_t count() const { return static_cast<int64_t>(bytes_.size()) / element_bytes(dtype_); }
  void* data() { return bytes_.data(); }
  float at(int64_t i) const {
    if (is_half(dtype_)) return widened(reinterpret_cast<const B16*>(bytes_.data())[i]);
    return reinterpret_cast<const float*>(bytes_.data())[i];
  }
  void set(int64_t i, float x) {
    if (is_half(dtype_)) {
      reinterpret_cast<B16*>(bytes_.data())[i] = rounded(x);
    } else {
      reinterpret_cast<float*>(bytes_.data())[i] = x;
    }
  }

 private:
  DType dtype_;
  std::vector<uint8_t> bytes_;
};

// The largest error beside what its bound allows: at most 1.
double worst_error(const Case& c) {
  Numbers numbers;
  const int64_t a_stride = (c.transpose_a ? c.m : c.k) + c.padding, b_stride = c.transpose_b ? c.k : c.n;
  const int64_t a_rows = c.transpose_a ? c.k : c.m;
  Matrix a(a_rows * a_stride - c.padding, DType::kB16), b(c.k * c.n, c.right), result(c.m * c.n, c.result);
  Matrix bias(c.n, DType::kF32);
  a.fill(&numbers);
  b.fill(&numbers);
  bias.fill(&numbers);
  result.fill(&numbers);
  const Matrix before = result;

  Gemm gemm;
  gemm.m = c.m, gemm.n = c.n, gemm.k = c.k;
  gemm.a.data = a.data();
  gemm.a.dtype = DType::kB16;
  gemm.a.stride = a_stride;
  gemm.a.transposed = c.transpose_a;
  Tensor right;
  right.data = b.data();
  right.dtype = c.right;
  gemm.b.set(right, 0, b_stride);
  gemm.b.transposed = c.transpose_b;
  gemm.c.data = result.data();
  gemm.c.dtype = c.result;
  gemm.c.stride = c.n;
  gemm.accumulate = c.accumulate;
  if (c.epilogue) {
    gemm.epilogue.bias = static_cast<const float*>(bias.data());
    gemm.epilogue.activation = kClip;
    gemm.epilogue.low = -2, gemm.epilogue.high = 2;
  }
  const int64_t room = part_scratch(c.m, c.n, c.k, copied(gemm.a), is_half(c.result));
  const std::unique_ptr<float, void (*)(void*)> scratch(
      static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(4 * room))), std::free);
  gemm_alone(gemm, scratch.get());

  double worst = 0;
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t n = 0; n < c.n; ++n) {
      double want = c.accumulate ? before.at(m * c.n + n) : 0, size = std::fabs(want) + 1;
      for (int64_t k = 0; k < c.k; ++k) {
        const double product =
            static_cast<double>(a.at(c.transpose_a ? k * a_stride + m : m * a_stride + k)) *
            static_cast<double>(as_half(b.at(c.transpose_b ? n * b_stride + k : k * b_stride + n)));
        want += product;
        size += std::fabs(product);
      }
      if (c.epilogue) want = std::fmin(std::fmax(want + static_cast<double>(bias.at(n)), -2.0), 2.0);
      double bound = static_cast<double>(c.k + 3) * 0x1p-24 * size;
      if (is_half(c.result)) bound += 0x1p-8 * (std::fabs(want) + bound);
      const double error = std::fabs(static_cast<double>(result.at(m * c.n + n)) - want);
      worst = std::isfinite(error) ? std::fmax(worst, error / bound) : INFINITY;
    }
  }
  return worst;
}

// Rows, columns and depths around tiles (16, 48 and 32), panels and blocks.
TEST("products keep to the bound of sums of floats, whatever their shape") {
  constexpr DType kB16 = DType::kB16, kF32 = DType::kF32;
  const Case cases[] = {
      {16, 48, 32},
      {1, 1, 1},
      {17, 49, 33},
      {5, 16, 31, false, true},
      {29, 33, 257},
      {33, 97, 70, false, true, kB16, kB16},
      {40, 130, 1301, false, false, kF32, kB16},
      {64, 16, 2048, false, false, kF32, kF32, true},
      {47, 401, 511, false, false, kB16, kF32, false, true},
      {300, 97, 1100, false, true, kF32, kB16, false, true},
      {16, 96, 1024, false, false, kF32, kB16, false, false, 3},
      {1, 20, 4, true},
      {31, 97, 211, true},
      {33, 48, 32, true, false, kB16, kB16},
      {70, 200, 1101, true, false, kF32, kF32, true},
      {210, 50, 333, true, false, kB16, kB16, false, true},
      {18, 40, 513, true, true, kF32, kF32, false, false, 5},
  };
  for (const Case& c : cases) {
    const double worst = worst_error(c);
    if (worst > 1)
      std::printf("  %d x %d x %d: %g\n", static_cast<int>(c.m), static_cast<int>(c.n), static_cast<int>(c.k),
                  worst);
    CHECK(worst <= 1);
  }
}

TEST("tiles are configured where shapes change, not for each of them, and given back at the end") {
  tile_unit.configured = 0;
  CHECK(worst_error({160, 480, 256}) <= 1);
  CHECK(tile_unit.configured == 1);
  for (const TileRegister& each : tile_unit.tile) CHECK(each.rows == 0);
  CHECK(worst_error({160, 480, 256}) <= 1);
  CHECK(tile_unit.configured == 2);
}

}  // namespace
}  // namespace pockc::test

int main() {
  if (!pockc::cpu_has_avx512_bf16()) {
    std::printf("skipped: the CPU has no AVX512_BF16, which such kernels use beside AMX\n");
    return 0;
  }
  return pockc::test::run_tests();
}
