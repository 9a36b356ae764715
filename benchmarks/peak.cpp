// What this machine can do at most on one core: floating-point operations in registers, bytes from memory.
// Compiled for the machine itself by benchmarks/kernels.py.
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <ctime>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * 4)));

double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

// GF/s of multiply-adds in registers: twelve independent chains hide the latency of two units.
extern "C" double peak_gflops(int64_t rounds) {
  constexpr int kChains = 12;
  volatile float start = 1.0f;  // unknown to the compiler, so that no two chains are the same
  Vector sum[kChains];
  for (int j = 0; j < kChains; ++j) sum[j] = Vector{} + start * static_cast<float>(j);
  const Vector factor = Vector{} + 0.999999f;
  const Vector term = Vector{} + 1e-6f;
  const double started = cpu_seconds();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) sum[j] = sum[j] * factor + term;
  }
  const double seconds = cpu_seconds() - started;
  Vector total = {};
  for (int j = 0; j < kChains; ++j) total += sum[j];
  volatile float sink = total[0];
  static_cast<void>(sink);
  return 2e-9 * kChains * kLanes * static_cast<double>(rounds) / seconds;
}

// GB/s of a[i] = b[i] + c[i] over arrays far larger than any cache; two are read, one is written.
extern "C" double peak_gigabytes(int64_t floats) {
  const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
  float* a = static_cast<float*>(std::aligned_alloc(64, bytes));
  float* b = static_cast<float*>(std::aligned_alloc(64, bytes));
  float* c = static_cast<float*>(std::aligned_alloc(64, bytes));
  for (int64_t i = 0; i < floats; ++i) a[i] = b[i] = c[i] = 1.0f;
  const double started = cpu_seconds();
  for (int64_t i = 0; i < floats; ++i) a[i] = b[i] + c[i];
  const double seconds = cpu_seconds() - started;
  volatile float sink = a[floats / 2];
  static_cast<void>(sink);
  std::free(a), std::free(b), std::free(c);
  return 3e-9 * static_cast<double>(bytes) / seconds;
}
