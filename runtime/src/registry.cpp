// The kernel tables, made from kernels.inc, and the choice of the instruction set.
#include <cstring>

#include "pockc/kernel.h"

#define POCKC_REF(op)             \
  Status check_##op(const Call&); \
  Status run_##op(const Call&);
#define POCKC_SIMD(op)
namespace pockc::ref {
#include "kernels.inc"
}
#undef POCKC_REF
#undef POCKC_SIMD

#define POCKC_REF(op)
#define POCKC_SIMD(op)            \
  bool accepts_##op(const Call&); \
  Status run_##op(const Call&);
#if defined(__aarch64__)
namespace pockc::simd_neon {
#include "kernels.inc"
}
#else
namespace pockc::simd_baseline {
#include "kernels.inc"
}
#endif
#if defined(__x86_64__)
namespace pockc::simd_avx2 {
#include "kernels.inc"
}
namespace pockc::simd_avx512 {
#include "kernels.inc"
}
#endif
#undef POCKC_REF
#undef POCKC_SIMD

namespace pockc {
namespace {

// A table ends with an entry without a name, so that it is never empty.
constexpr KernelEntry kEnd = {nullptr, nullptr, nullptr, nullptr, nullptr};

#define POCKC_REF(op) {#op, "ref", ref::check_##op, nullptr, ref::run_##op},
#define POCKC_SIMD(op)
constexpr KernelEntry kReference[] = {
#include "kernels.inc"
    kEnd};
#undef POCKC_REF
#undef POCKC_SIMD

#define POCKC_REF(op)
#if defined(__aarch64__)
#define POCKC_SIMD(op) {#op, "simd-neon", nullptr, simd_neon::accepts_##op, simd_neon::run_##op},
constexpr KernelEntry kNeon[] = {
#include "kernels.inc"
    kEnd};
#undef POCKC_SIMD
#else
#define POCKC_SIMD(op) {#op, "simd-baseline", nullptr, simd_baseline::accepts_##op, simd_baseline::run_##op},
constexpr KernelEntry kBaseline[] = {
#include "kernels.inc"
    kEnd};
#undef POCKC_SIMD
#endif
#if defined(__x86_64__)
#define POCKC_SIMD(op) {#op, "simd-avx2", nullptr, simd_avx2::accepts_##op, simd_avx2::run_##op},
constexpr KernelEntry kAvx2[] = {
#include "kernels.inc"
    kEnd};
#undef POCKC_SIMD
#define POCKC_SIMD(op) {#op, "simd-avx512", nullptr, simd_avx512::accepts_##op, simd_avx512::run_##op},
constexpr KernelEntry kAvx512[] = {
#include "kernels.inc"
    kEnd};
#undef POCKC_SIMD
#endif
#undef POCKC_REF

struct InstructionSet {
  const char* name;
  const KernelEntry* table;
  bool (*runs_here)();
};

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best first.
constexpr InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, has_avx512},
    {"avx2", kAvx2, has_avx2},
#endif
#if defined(__aarch64__)
    {"neon", kNeon, always},
#else
    {"baseline", kBaseline, always},
#endif
};

const KernelEntry* find(const KernelEntry* table, const char* op) {
  for (const KernelEntry* entry = table; entry->op != nullptr; ++entry) {
    if (std::strcmp(entry->op, op) == 0) return entry;
  }
  return nullptr;
}

const InstructionSet* find_instruction_set(const char* isa) {
  for (const InstructionSet& set : kInstructionSets) {
    if (isa != nullptr && std::strcmp(isa, set.name) != 0) continue;
    if (set.runs_here()) return &set;
  }
  return nullptr;
}

}  // namespace

const KernelEntry* find_reference(const char* op) { return find(kReference, op); }

const KernelEntry* find_simd(const char* op, const char* isa) {
  const InstructionSet* set = find_instruction_set(isa);
  return set == nullptr ? nullptr : find(set->table, op);
}

const KernelEntry* find_simd(const char* op) { return find_simd(op, nullptr); }

const char* best_isa() { return find_instruction_set(nullptr)->name; }

}  // namespace pockc
