// The kernel tables, made from kernels.inc, and the choice of the instruction set.
#include <cstring>

#include "cpu_features.h"
#include "half.h"
#include "pockc/kernel.h"

#include "kernels.inc"  // the list of one program may define POCKC_WITHOUT_<SET>: its board needs no such set

#if defined(__aarch64__) || defined(__arm__)
#if !defined(POCKC_WITHOUT_NEON)
#define POCKC_HAS_NEON 1
#endif
#elif !defined(POCKC_WITHOUT_BASELINE)
#define POCKC_HAS_BASELINE 1
#endif
#if defined(__x86_64__) && !defined(POCKC_WITHOUT_AVX2)
#define POCKC_HAS_AVX2 1
#endif
#if defined(__x86_64__) && !defined(POCKC_WITHOUT_AVX512)
#define POCKC_HAS_AVX512 1
#endif
#if (defined(POCKC_HAS_DOTPROD) || defined(POCKC_HAS_FP16)) && defined(__linux__)
#include <sys/auxv.h>
#endif

// kernels.inc ends by undefining its macros: each inclusion is preceded by the one meaning that it shall
// have.
#define POCKC_DECLARE_REF(op)     \
  Status check_##op(const Call&); \
  Status run_##op(const Call&);
#define POCKC_DECLARE_SIMD(op)    \
  bool accepts_##op(const Call&); \
  Status run_##op(const Call&);

namespace pockc::ref {
#define POCKC_REF POCKC_DECLARE_REF
#include "kernels.inc"
}  // namespace pockc::ref
#if defined(POCKC_HAS_NEON)
namespace pockc::simd_neon {
#define POCKC_SIMD POCKC_DECLARE_SIMD
#include "kernels.inc"
}  // namespace pockc::simd_neon
#if defined(POCKC_HAS_DOTPROD)
namespace pockc::simd_dotprod {
#define POCKC_DOTPROD POCKC_DECLARE_SIMD
#include "kernels.inc"
}  // namespace pockc::simd_dotprod
#endif
#if defined(POCKC_HAS_FP16)
namespace pockc::simd_fp16 {
#define POCKC_HALF_PRODUCTS POCKC_DECLARE_SIMD
#include "kernels.inc"
}  // namespace pockc::simd_fp16
#endif
#endif
#if defined(POCKC_HAS_BASELINE)
namespace pockc::simd_baseline {
#define POCKC_SIMD POCKC_DECLARE_SIMD
#include "kernels.inc"
}  // namespace pockc::simd_baseline
#endif
#if defined(POCKC_HAS_AVX2)
namespace pockc::simd_avx2 {
#define POCKC_SIMD POCKC_DECLARE_SIMD
#include "kernels.inc"
}  // namespace pockc::simd_avx2
#endif
#if defined(POCKC_HAS_AVX512)
namespace pockc::simd_avx512 {
#define POCKC_SIMD POCKC_DECLARE_SIMD
#include "kernels.inc"
}  // namespace pockc::simd_avx512
#if defined(POCKC_HAS_BF16)
namespace pockc::simd_bf16 {
#define POCKC_HALF_PRODUCTS POCKC_DECLARE_SIMD
#define POCKC_BF16_PRODUCTS POCKC_DECLARE_SIMD
#include "kernels.inc"
}  // namespace pockc::simd_bf16
#endif
#if defined(POCKC_HAS_AMX)
namespace pockc::simd_amx {
#define POCKC_HALF_PRODUCTS POCKC_DECLARE_SIMD
#define POCKC_BF16_PRODUCTS POCKC_DECLARE_SIMD
#include "kernels.inc"
}  // namespace pockc::simd_amx
#endif
#endif

namespace pockc {
namespace {

// A table ends with an entry without a name, so that it is never empty.
constexpr KernelEntry kEnd = {nullptr, nullptr, nullptr, nullptr, nullptr};

constexpr KernelEntry kReference[] = {
#define POCKC_REF(op) {#op, "ref", ref::check_##op, nullptr, ref::run_##op},
#include "kernels.inc"
    kEnd};
#if defined(POCKC_HAS_NEON)
constexpr KernelEntry kNeon[] = {
#define POCKC_SIMD(op) {#op, "simd-neon", nullptr, simd_neon::accepts_##op, simd_neon::run_##op},
#include "kernels.inc"
    kEnd};
#if defined(POCKC_HAS_DOTPROD)
constexpr KernelEntry kDotprod[] = {
#define POCKC_DOTPROD(op) \
  {#op, "simd-neon-dotprod", nullptr, simd_dotprod::accepts_##op, simd_dotprod::run_##op},
#include "kernels.inc"
    kEnd};
#endif
#if defined(POCKC_HAS_FP16)
constexpr KernelEntry kFp16[] = {
#define POCKC_HALF_PRODUCTS(op) \
  {#op, "simd-neon-fp16", nullptr, simd_fp16::accepts_##op, simd_fp16::run_##op},
#include "kernels.inc"
    kEnd};
#endif
#endif
#if defined(POCKC_HAS_BASELINE)
constexpr KernelEntry kBaseline[] = {
#define POCKC_SIMD(op) {#op, "simd-baseline", nullptr, simd_baseline::accepts_##op, simd_baseline::run_##op},
#include "kernels.inc"
    kEnd};
#endif
#if defined(POCKC_HAS_AVX2)
constexpr KernelEntry kAvx2[] = {
#define POCKC_SIMD(op) {#op, "simd-avx2", nullptr, simd_avx2::accepts_##op, simd_avx2::run_##op},
#include "kernels.inc"
    kEnd};
#endif
#if defined(POCKC_HAS_AVX512)
constexpr KernelEntry kAvx512[] = {
#define POCKC_SIMD(op) {#op, "simd-avx512", nullptr, simd_avx512::accepts_##op, simd_avx512::run_##op},
#include "kernels.inc"
    kEnd};
#if defined(POCKC_HAS_BF16)
constexpr KernelEntry kBf16[] = {
#define POCKC_HALF_PRODUCTS(op) \
  {#op, "simd-avx512-bf16", nullptr, simd_bf16::accepts_##op, simd_bf16::run_##op},
#define POCKC_BF16_PRODUCTS POCKC_HALF_PRODUCTS
#include "kernels.inc"
    kEnd};
#endif
#if defined(POCKC_HAS_AMX)
constexpr KernelEntry kAmx[] = {
#define POCKC_HALF_PRODUCTS(op) {#op, "simd-avx512-amx", nullptr, simd_amx::accepts_##op, simd_amx::run_##op},
#define POCKC_BF16_PRODUCTS POCKC_HALF_PRODUCTS
#include "kernels.inc"
    kEnd};
#endif
#endif

struct HalfForm {
  const char* op;
  uint32_t inputs;
  bool narrows;
};
constexpr HalfForm kHalfForms[] = {
#define POCKC_NARROWS(op, inputs) {#op, inputs, true},
#define POCKC_SUMS(op, inputs) {#op, inputs, false},
#include "halves.inc"
};

const HalfForm* find_half_form(const char* op) {
  for (const HalfForm& form : kHalfForms) {
    if (std::strcmp(form.op, op) == 0) return &form;
  }
  return nullptr;
}

// The call as if every operand of 16 bits were one of floats.
struct WidenedCall {
  static constexpr int kMost = 16;  // inputs, and outputs, of ops that take such operands
  Tensor tensors[2 * kMost];
  const Tensor* lists[2 * kMost] = {};
  Call call;

  explicit WidenedCall(const Call& from) : call(from) {
    for (int i = 0; i < from.input_count; ++i) add(i, from.inputs[i]);
    for (int i = 0; i < from.output_count; ++i) add(kMost + i, from.outputs[i]);
    call.inputs = Operands(lists);
    call.outputs = Operands(lists + kMost);
  }
  void add(int at, const Tensor& tensor) {
    tensors[at] = tensor;
    if (is_half(tensor.dtype)) tensors[at].dtype = DType::kF32;
    lists[at] = &tensors[at];
  }
};

// Whether some operand has 16 bits.
bool has_halves(const Call& call) {
  for (int i = 0; i < call.input_count; ++i) {
    if (is_half(call.inputs[i].dtype)) return true;
  }
  for (int i = 0; i < call.output_count; ++i) {
    if (is_half(call.outputs[i].dtype)) return true;
  }
  return false;
}

// Whether operands of 16 bits are where the op takes them, and all of one dtype.
bool halves_fit(const char* op, const Call& call) {
  const HalfForm* form = find_half_form(op);
  if (form == nullptr || call.input_count > WidenedCall::kMost || call.output_count > WidenedCall::kMost)
    return false;
  DType dtype = DType::kF32;
  const auto fits = [&](const Tensor& tensor, bool taken) {
    if (!is_half(tensor.dtype)) return true;
    const bool alike = dtype == DType::kF32 || dtype == tensor.dtype;
    dtype = tensor.dtype;
    return taken && alike;
  };
  for (int i = 0; i < call.input_count; ++i) {
    if (!fits(call.inputs[i], (form->inputs >> i & 1u) != 0)) return false;
  }
  for (int i = 0; i < call.output_count; ++i) {
    if (!fits(call.outputs[i], i == 0 && form->narrows)) return false;
  }
  return true;
}

struct InstructionSet {
  const char* name;
  const KernelEntry* table;
  const KernelEntry* rest;  // of a set that adds to another: what the table lacks is there
  bool (*runs_here)();
  const char* needs;  // of the CPU, in words
};

#if defined(POCKC_HAS_NEON) || defined(POCKC_HAS_BASELINE)
bool always() { return true; }
#endif
#if defined(POCKC_HAS_DOTPROD)
bool has_dotprod() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#else
  return false;
#endif
}
#endif

// Best first. It ends with a set without a name, so that it is never empty.
constexpr InstructionSet kInstructionSets[] = {
#if defined(POCKC_HAS_AVX512)
    {"avx512", kAvx512, nullptr, cpu_has_avx512, "AVX-512 (F, BW, DQ, VL)"},
#endif
#if defined(POCKC_HAS_AVX2)
    {"avx2", kAvx2, nullptr, cpu_has_avx2, "AVX2 or FMA"},
#endif
#if defined(POCKC_HAS_DOTPROD)
    {"neon-dotprod", kDotprod, kNeon, has_dotprod, ""},
#endif
#if defined(POCKC_HAS_NEON)
    {"neon", kNeon, nullptr, always, ""},
#endif
#if defined(POCKC_HAS_BASELINE)
    {"baseline", kBaseline, nullptr, always, ""},
#endif
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

const KernelEntry* find(const KernelEntry* table, const char* op) {
  for (const KernelEntry* entry = table; entry->op != nullptr; ++entry) {
    if (std::strcmp(entry->op, op) == 0) return entry;
  }
  return nullptr;
}

struct HalfProducts {
  const KernelEntry* table;
  const char* name;
};

// The kernels that multiply numbers of this dtype as such; null where this build or the CPU has none.
HalfProducts half_products(DType dtype) {
#if defined(POCKC_HAS_FP16) && defined(__linux__)
  constexpr unsigned long kHalfArithmetic = 1ul << 10;  // HWCAP_ASIMDHP
  if (dtype == DType::kF16 && (getauxval(AT_HWCAP) & kHalfArithmetic) != 0) return {kFp16, "fp16"};
#elif defined(POCKC_HAS_AVX512)
#if defined(POCKC_HAS_AMX)
  if (dtype == DType::kB16 && cpu_has_amx()) return {kAmx, "bf16 (AMX)"};
#endif
#if defined(POCKC_HAS_BF16)
  if (dtype == DType::kB16 && cpu_has_avx512_bf16()) return {kBf16, "bf16"};
#endif
#endif
  (void)dtype;
  return {nullptr, nullptr};
}

const KernelEntry* added = nullptr;

const InstructionSet* find_instruction_set(const char* isa) {
  for (const InstructionSet* set = kInstructionSets; set->name != nullptr; ++set) {
    if (isa != nullptr && std::strcmp(isa, set->name) != 0) continue;
    if (set->runs_here()) return set;
  }
  return nullptr;
}

}  // namespace

void add_reference(const KernelEntry* kernel) { added = kernel; }

const KernelEntry* find_reference(const char* op) {
  const KernelEntry* found = find(kReference, op);
  return found == nullptr && added != nullptr && std::strcmp(added->op, op) == 0 ? added : found;
}

Status check_call(const KernelEntry& reference, const Call& call, bool* has_reference) {
  *has_reference = true;
  const Status status = reference.check(call);
  if (status == PK_OK || !has_halves(call) || !halves_fit(reference.op, call)) return status;
  *has_reference = false;
  return reference.check(WidenedCall(call).call);
}

const KernelEntry* find_simd(const char* op, const char* isa) {
  const InstructionSet* set = find_instruction_set(isa);
  if (set == nullptr) return nullptr;
  const KernelEntry* found = find(set->table, op);
  return found == nullptr && set->rest != nullptr ? find(set->rest, op) : found;
}

const KernelEntry* find_simd(const char* op) { return find_simd(op, nullptr); }

const KernelEntry* find_half_arithmetic(const char* op, DType dtype) {
  const KernelEntry* table = half_products(dtype).table;
  return table == nullptr ? nullptr : find(table, op);
}

const char* half_arithmetic(DType dtype) { return half_products(dtype).name; }

const char* best_isa() {
  const InstructionSet* set = find_instruction_set(nullptr);
  return set == nullptr ? "reference" : set->name;
}

const char* what_cpu_lacks() {
  if (find_instruction_set(nullptr) != nullptr) return nullptr;
  const char* least = nullptr;
  for (const InstructionSet* set = kInstructionSets; set->name != nullptr; ++set) least = set->needs;
  return least;
}

bool is_specialised() {
#if defined(POCKC_SPECIALISED)
  return true;
#else
  return false;
#endif
}

}  // namespace pockc
