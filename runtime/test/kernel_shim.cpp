// One C function that runs a single kernel on given tensors, for tests and benchmarks written in Python.
#include <cstring>

#include "pockc/kernel.h"

namespace {

constexpr int kMostOperands = 64;

bool convert(const pk_tensor* tensors, int count, bool with_data, pockc::Tensor* out) {
  if (count > kMostOperands) return false;
  for (int i = 0; i < count; ++i) {
    out[i].data = with_data ? tensors[i].data : nullptr;
    int32_t code = 0;  // not one of pk_dtype where it is seen inside of a program alone
    static_assert(sizeof(code) == sizeof(tensors[i].dtype), "an enumeration is an int");
    std::memcpy(&code, &tensors[i].dtype, sizeof(code));
    out[i].dtype = static_cast<pockc::DType>(code);
    out[i].rank = tensors[i].rank;
    std::memcpy(out[i].dims, tensors[i].dims, sizeof(out[i].dims));
  }
  return true;
}

}  // namespace

extern "C" {

typedef struct kernel_call {
  const pk_tensor* inputs;
  const pk_tensor* outputs;
  const int64_t* ints;
  const double* floats;
  int32_t input_count, output_count, int_count, float_count;
  void* workspace;
  uint64_t workspace_bytes;
  int32_t threads;
  int32_t check_only;
} kernel_call;

// Checks the call as a program's load does, data pointers null, then runs it. `provider` is "ref", "simd"
// (the best instruction set of this CPU), "simd-<instruction set>", or "half-f16" or "half-b16", which
// multiply such numbers as such; a simd kernel that is missing, does not run here or does not accept the call
// gives PK_UNSUPPORTED, an unknown op PK_NOT_FOUND.
PK_API int32_t kernel_shim_run(const char* op, const char* provider, const kernel_call* arguments) {
  const pockc::KernelEntry* reference = pockc::find_reference(op);
  if (reference == nullptr) return PK_NOT_FOUND;
  pockc::Tensor inputs[kMostOperands], outputs[kMostOperands];
  if (!convert(arguments->inputs, arguments->input_count, false, inputs)) return PK_INVALID_ARGUMENT;
  if (!convert(arguments->outputs, arguments->output_count, false, outputs)) return PK_INVALID_ARGUMENT;
  pockc::ThreadPool pool(arguments->threads);
  pockc::Call call;
  const pockc::Tensor *input_list[kMostOperands], *output_list[kMostOperands];
  for (int i = 0; i < kMostOperands; ++i) {
    input_list[i] = &inputs[i];
    output_list[i] = &outputs[i];
  }
  call.inputs = pockc::Operands(input_list);
  call.input_count = arguments->input_count;
  call.outputs = pockc::Operands(output_list);
  call.output_count = arguments->output_count;
  call.ints = arguments->ints;
  call.int_count = arguments->int_count;
  call.floats = arguments->floats;
  call.float_count = arguments->float_count;
  call.workspace_bytes = arguments->workspace_bytes;
  call.pool = &pool;
  bool has_reference = true;
  const pockc::Status status = pockc::check_call(*reference, call, &has_reference);
  if (status != PK_OK) return status;

  const pockc::KernelEntry* entry = reference;
  if (std::strcmp(provider, "ref") != 0) {
    const char* dash = std::strchr(provider, '-');
    entry = dash == nullptr ? pockc::find_simd(op) : pockc::find_simd(op, dash + 1);
    if (std::strcmp(provider, "half-f16") == 0) entry = pockc::find_half_arithmetic(op, pockc::DType::kF16);
    if (std::strcmp(provider, "half-b16") == 0) entry = pockc::find_half_arithmetic(op, pockc::DType::kB16);
    if (entry == nullptr || !entry->accepts(call)) return PK_UNSUPPORTED;
  } else if (!has_reference && arguments->check_only == 0) {
    return PK_UNSUPPORTED;
  }
  if (arguments->check_only != 0) return PK_OK;
  convert(arguments->inputs, arguments->input_count, true, inputs);
  convert(arguments->outputs, arguments->output_count, true, outputs);
  call.workspace = arguments->workspace;
  return entry->run(call);
}

}  // extern "C"
