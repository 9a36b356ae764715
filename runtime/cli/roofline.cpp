#include "roofline.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "measure.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) || defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace pockc::cli {
namespace {

// --- What a call does: as passes/cost.py has it ---

struct Types {
  const Program& program;
  Span<uint32_t> inputs, outputs;

  const Tensor& in(size_t i) const { return program.tensors[inputs[i]].type; }
  const Tensor& out(size_t i) const { return program.tensors[outputs[i]].type; }
  double in_bytes(size_t i) const { return static_cast<double>(program.tensors[inputs[i]].bytes); }
  double out_bytes(size_t i) const { return static_cast<double>(program.tensors[outputs[i]].bytes); }
};

bool is_any(const std::string& op, std::initializer_list<const char*> names) {
  return std::any_of(names.begin(), names.end(), [&](const char* name) { return op == name; });
}

double elements(const Tensor& type) { return static_cast<double>(type.elements()); }
double dimension(const Tensor& type, int from_the_end) {
  return static_cast<double>(type.dims[type.rank - from_the_end]);
}
// Of one output channel of a weight, or of a group of it.
double filter(const Tensor& weight) { return elements(weight) / static_cast<double>(weight.dims[0]); }

// Of queries and values.
double scores(const Tensor& queries, const Tensor& values) {
  return elements(queries) / dimension(queries, 1) * dimension(values, 2) *
         (dimension(queries, 1) + dimension(values, 1));
}

double multiply_adds(const std::string& op, const Types& t) {
  if (t.outputs.size() == 0 || elements(t.out(0)) == 0) return 0;
  if (op == "matmul") {
    const double rows = dimension(t.out(0), 2);  // (m, k) or (k, m): k is what is left
    return elements(t.out(0)) * dimension(t.in(0), 1) * dimension(t.in(0), 2) / rows;
  }
  if (op == "conv2d") return elements(t.out(0)) * filter(t.in(1));
  if (op == "conv2d_int8") return elements(t.out(0)) * elements(t.in(1)) / dimension(t.in(1), 1);
  if (op == "conv2d_winograd") return elements(t.out(0)) * elements(t.in(1)) / dimension(t.out(0), 1);
  if (is_any(op, {"conv2d_grad_input", "conv2d_grad_input_masked"}))
    return elements(t.in(0)) * filter(t.in(1));
  if (op == "conv2d_grad_weight") return elements(t.in(1)) * filter(t.out(0));
  if (op == "attention") return scores(t.in(0), t.in(2));
  if (op == "attention_grad") return 2.5 * scores(t.in(1), t.in(3));
  return 0;
}

double moved_bytes(const std::string& op, const Types& t) {
  if (is_any(op, {"slice", "take", "embedding"})) return 2 * t.out_bytes(0);
  if (op == "insert")
    return 2 * t.in_bytes(t.inputs.size() - 1);  // what it goes into may be new: then it is no input
  double sum = 0;
  if (is_any(op, {"sgd", "momentum", "adam", "lion", "momentum8", "adam8", "lion8"})) {
    // Of the parameter, what the gradient covers; a slot is read and written.
    sum = 3 * t.in_bytes(1);
    for (size_t i = 1; i < t.outputs.size(); ++i) sum += t.in_bytes(1 + i) + t.out_bytes(i);
    return sum;
  }
  for (size_t i = 0; i < t.inputs.size(); ++i) sum += t.in_bytes(i);
  for (size_t i = 0; i < t.outputs.size(); ++i) sum += t.out_bytes(i);
  return sum;
}

// --- What a core can do ---

constexpr int64_t kRounds = 1 << 20;
constexpr double kShare = 0.25;  // of the memory that is free, at most
constexpr int64_t kMostFloats = 3 * (8 << 20);

// Independent chains of multiply-adds, enough to hide the latency of two units. The numbers grow slowly;
// `start` is unknown to the compiler, so that no two chains are the same.
constexpr int kChains = 12;
#if defined(__clang__)
#define POCKC_UNROLL _Pragma("unroll 12")
#else
#define POCKC_UNROLL _Pragma("GCC unroll 12")
#endif
#define POCKC_MULTIPLY_ADDS(name, attribute, Vector, splat, add, multiply_add, lane)              \
  attribute float name(float start) {                                                             \
    const Vector factor = splat(0.999999f), term = splat(1e-6f);                                  \
    Vector sum[kChains], total = splat(0.0f);                                                     \
    POCKC_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = splat(start + static_cast<float>(i)); \
    for (int64_t round = 0; round < kRounds; ++round) {                                           \
      POCKC_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = multiply_add(sum[i], factor, term); \
    }                                                                                             \
    POCKC_UNROLL for (int i = 0; i < kChains; ++i) total = add(total, sum[i]);                    \
    return lane(total);                                                                           \
  }

#if defined(__x86_64__)
#define POCKC_FMA(a, b, c) _mm_add_ps(_mm_mul_ps(a, b), c)
POCKC_MULTIPLY_ADDS(multiply_adds_sse, , __m128, _mm_set1_ps, _mm_add_ps, POCKC_FMA, _mm_cvtss_f32)
POCKC_MULTIPLY_ADDS(multiply_adds_avx2, __attribute__((target("avx2,fma"))), __m256, _mm256_set1_ps,
                    _mm256_add_ps, _mm256_fmadd_ps, _mm256_cvtss_f32)
POCKC_MULTIPLY_ADDS(multiply_adds_avx512, __attribute__((target("avx512f"))), __m512, _mm512_set1_ps,
                    _mm512_add_ps, _mm512_fmadd_ps, _mm512_cvtss_f32)
#elif defined(__aarch64__) || defined(__ARM_NEON)
#define POCKC_FMA(a, b, c) vfmaq_f32(c, a, b)
#define POCKC_LANE(a) vgetq_lane_f32(a, 0)
POCKC_MULTIPLY_ADDS(multiply_adds_neon, , float32x4_t, vdupq_n_f32, vaddq_f32, POCKC_FMA, POCKC_LANE)
#else
#define POCKC_SAME(a) (a)
#define POCKC_SUM(a, b) ((a) + (b))
POCKC_MULTIPLY_ADDS(multiply_adds_scalar, , float, POCKC_SAME, POCKC_SUM, __builtin_fmaf, POCKC_SAME)
#endif

struct Loop {
  float (*run)(float start);
  int lanes;
};

Loop best_loop() {
#if defined(__x86_64__)
  const char* const isa = best_isa();
  if (std::strcmp(isa, "avx512") == 0) return {multiply_adds_avx512, 16};
  if (std::strcmp(isa, "avx2") == 0) return {multiply_adds_avx2, 8};
  return {multiply_adds_sse, 4};
#elif defined(__aarch64__) || defined(__ARM_NEON)
  return {multiply_adds_neon, 4};
#else
  return {multiply_adds_scalar, 1};
#endif
}

double measure_gflops() {
  const Loop loop = best_loop();
  volatile float start = 1.0f, sink;
  double best = 0;
  for (int attempt = 0; attempt < 3; ++attempt) {
    const double started = cpu_seconds();
    sink = loop.run(start);
    const double seconds = cpu_seconds() - started;
    if (seconds > 0)
      best = std::max(best, 2e-9 * kChains * loop.lanes * static_cast<double>(kRounds) / seconds);
  }
  static_cast<void>(sink);
  return best;
}

double measure_gigabytes() {
  const double free =
      static_cast<double>(sysconf(_SC_AVPHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  const int64_t most = std::min(kMostFloats, static_cast<int64_t>(kShare * free / sizeof(float))),
                count = most / 3;
  if (count < 1024) return 0;
  const std::unique_ptr<float[]> memory(new (std::nothrow) float[static_cast<size_t>(3 * count)]);
  if (memory == nullptr) return 0;
  float *a = memory.get(), *b = a + count, *c = b + count;
  for (int64_t i = 0; i < 3 * count; ++i) a[i] = 1.0f;
  double best = 0;
  for (int attempt = 0; attempt < 2; ++attempt) {
    const double started = cpu_seconds();
    for (int64_t i = 0; i < count; ++i) a[i] = b[i] + c[i];
    const double seconds = cpu_seconds() - started;
    if (seconds > 0) best = std::max(best, 3e-9 * sizeof(float) * static_cast<double>(count) / seconds);
  }
  volatile float sink = a[count / 2];
  static_cast<void>(sink);
  return best;
}

}  // namespace

Work work_of(const Program& program, const EntryRecord& entry, const CallRecord& call) {
  const Types types{program, entry.inputs_of(call), entry.outputs_of(call)};
  const std::string& op = program.strings[call.op];
  return {2 * multiply_adds(op, types), moved_bytes(op, types)};
}

Limits measure_limits() { return {measure_gflops(), measure_gigabytes()}; }

}  // namespace pockc::cli
