// The contract between the program walker and every kernel.
//
// A kernel is one file and one line in kernels.inc. It has two functions:
//   Status check_<op>(const Call&)   once, at load: operand count, dtypes, shapes and attributes. Data
//   pointers are
//                                    null then. It must refuse everything that could make `run` touch memory
//                                    outside its operands: a program file may come from anywhere.
//   Status run_<op>(const Call&)     every step. May fail only on data (an id out of range). That of `gate`
//                                    alone may return kEntryEnds.
// The `ref` provider has both for every op and needs no workspace. A `simd` kernel adds
//   bool accepts_<op>(const Call&)   true when it can run this (already checked) call in the workspace that
//   is given;
// otherwise the call falls back to `ref`.
//
// Aliasing: output 0 may be the very same buffer as an input that the op table calls "in place"; the outputs
// of an optimizer are the same buffers as its p, m, v. Otherwise outputs never overlap inputs. Alignment:
// every tensor and the workspace start at a multiple of 64 bytes. Outputs hold garbage before the call: a
// kernel writes every element.
#ifndef POCKC_KERNEL_H_
#define POCKC_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "pockc/runtime.h"

namespace pockc {

class ThreadPool;

using Status = pk_status;  // PK_OK on success

// What a gate returns where it is shut: the session ends the entry there, and that is a success. Inside the
// runtime alone; no caller sees it.
constexpr Status kEntryEnds = static_cast<Status>(15);

// The codes of program files. The first five are those of pk_dtype. The next are frozen weights in fewer
// bytes (kernels/compact.h), which lie in the file alone: callers of the C interface see them as floats. The
// last are activations and their gradients in 16 bits (kernels/half.h), of which callers of the C
// interface see none.
enum class DType : uint8_t {
  kF32 = 0,
  kI64 = 1,
  kI32 = 2,
  kU8 = 3,
  kBool = 4,
  kBF16 = 5,
  kQ8 = 6,
  kQ4 = 7,
  kF16 = 8,
  kB16 = 9
};
constexpr int kMaxRank = 8;
constexpr size_t kAlignment = 64;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int32_t rank = 0;
  int64_t dims[kMaxRank] = {};

  // Always inlined: these are also compiled for wider instruction sets, and a copy of those that the linker
  // picked for everybody would stop on an older CPU.
  __attribute__((always_inline)) int64_t elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= dims[i];
    return n;
  }
  template <typename T>
  __attribute__((always_inline)) T* as() const {
    return static_cast<T*>(data);
  }
};

// The operands of a call, by reference: a session has one record for a tensor, whatever number of calls use
// it.
class Operands {
 public:
  Operands() = default;
  explicit Operands(const Tensor* const* list) : list_(list) {}
  __attribute__((always_inline)) const Tensor& operator[](int64_t index) const { return *list_[index]; }
  // Whether these are the operands of the same call of the same session.
  bool operator==(const Operands& other) const { return list_ == other.list_; }

 private:
  const Tensor* const* list_ = nullptr;
};

// One kernel call: operands, attributes in the canonical order of the op table, scratch memory.
struct Call {
  Operands inputs;
  int32_t input_count = 0;
  Operands outputs;
  int32_t output_count = 0;
  const int64_t* ints =
      nullptr;  // int, bool: one entry; tuple: its length, then its elements; enum: its index
  int32_t int_count = 0;
  const double* floats = nullptr;
  int32_t float_count = 0;
  void* workspace = nullptr;  // inside the arena; contents undefined
  size_t workspace_bytes = 0;
  ThreadPool* pool = nullptr;
};

using CheckFunction = Status (*)(const Call&);
using AcceptsFunction = bool (*)(const Call&);
using RunFunction = Status (*)(const Call&);

// Sleeps between jobs, never spins. `parallel_for` splits [0, count) into at most `threads()` contiguous
// ranges that are multiples of `grain` (but the last); results must not depend on the split.
class ThreadPool {
 public:
  using Body = void (*)(void* context, int64_t begin, int64_t end, int thread);

  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }
  void parallel_for(int64_t count, int64_t grain, Body body, void* context);

  // The same for a callable: f(begin, end, thread).
  template <typename F>
  void parallel_for(int64_t count, int64_t grain, F&& f) {
    parallel_for(
        count, grain,
        [](void* context, int64_t begin, int64_t end, int thread) {
          (*static_cast<F*>(context))(begin, end, thread);
        },
        &f);
  }

 private:
  struct State;
  State* state_ = nullptr;  // null with one thread: no pool is started
  int threads_ = 1;
};

// What a program's calls are bound to at load.
struct KernelEntry {
  const char* op;
  // "ref", "simd-baseline", "simd-avx2", "simd-avx512", "simd-neon", "simd-neon-dotprod", "simd-neon-fp16",
  // "simd-avx512-bf16" or "simd-avx512-amx"
  const char* provider;
  CheckFunction check;      // ref only
  AcceptsFunction accepts;  // null for ref
  RunFunction run;
};

// The ref kernel of an op, or null: such an op does not exist in this build.
const KernelEntry* find_reference(const char* op);
// Adds an op that only the program which links this library has: found where the tables have none of its
// name. One at most, before anything is loaded; `kernel` must outlive every session.
void add_reference(const KernelEntry* kernel);
// Checks a call as the reference does; where that refuses operands of 16 bits that simd kernels take, with
// floats in their place. Then the call has no reference kernel: it runs only where a simd kernel accepts it.
Status check_call(const KernelEntry& reference, const Call& call, bool* has_reference);
// The best simd kernel of this op that the CPU can run, or null.
const KernelEntry* find_simd(const char* op);
// The same from one instruction set ("baseline", "avx2", "avx512", "neon"; null: the best); null when the CPU
// lacks it.
const KernelEntry* find_simd(const char* op, const char* isa);
// The kernel of this op that multiplies numbers of this 16-bit dtype, for programs that ask for it; null
// where there is none, or the CPU has no such arithmetic.
const KernelEntry* find_half_arithmetic(const char* op, DType dtype);
// What multiplies such numbers here, in words; null where nothing does.
const char* half_arithmetic(DType dtype);
// The name of the instruction set that is used here; "reference" where this build has none.
const char* best_isa();
// What this build needs and the CPU lacks, in words; null where it runs here. Only a pock-run that was made
// for one kind of CPU can lack anything.
const char* what_cpu_lacks();
// Whether this build has the kernels of one program alone: a pock-run that was made for it.
bool is_specialised();

// Sets pk_last_error of this thread and returns `status`. For a kernel that fails on its data: one clause
// without the op's name, which the session puts before it, such as "id 40000 at position 7 is outside the
// table of 30522 rows". To be called from the thread that called the kernel.
Status fail(Status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace pockc

#endif  // POCKC_KERNEL_H_
