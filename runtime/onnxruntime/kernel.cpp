#include "kernel.h"

#include "error.h"
#include "ort.h"

namespace pockc::ort {
namespace {

// By the call's one attribute.
constexpr const char* kEntries[] = {"train_step", "accumulate", "eval_step", "infer"};
constexpr int64_t kEntryCount = sizeof(kEntries) / sizeof(kEntries[0]);

struct Models {
  std::string folder;
  Model models[kEntryCount];
  bool loaded[kEntryCount] = {};
};

Models& models() {
  static Models all;
  return all;
}

// ONNX Runtime itself checks that shapes and element types are those of the model, at every run.
Status check(const Call& call) {
  if (call.int_count != 1 || call.ints[0] < 0 || call.ints[0] >= kEntryCount) {
    return fail(PK_BAD_FILE, "it names no entry");
  }
  for (int32_t i = 0; i < call.input_count + call.output_count; ++i) {
    const Tensor& tensor = i < call.input_count ? call.inputs[i] : call.outputs[i - call.input_count];
    if (tensor.dtype > DType::kBool) return fail(PK_BAD_FILE, "operand %d is compact", i);
  }
  return PK_OK;
}

// Inputs: those of the entry, then states. Outputs: those of the entry, then new values of states, which may
// be the very buffers of the old ones where the compiler found that nothing reads those later.
Status run(const Call& call) {
  Models& all = models();
  const int64_t entry = call.ints[0];
  Model& model = all.models[entry];
  if (!all.loaded[entry]) {
    const int threads = call.pool == nullptr ? 1 : call.pool->threads();
    POCKC_TRY(model.load(all.folder + kEntries[entry] + ".onnx", threads));
    all.loaded[entry] = true;
  }
  if (!model.is_bound_to(call)) POCKC_TRY(model.bind(call));
  return model.run();
}

constexpr KernelEntry kKernel = {"onnxruntime", "ref", check, nullptr, run};

}  // namespace

void add_kernel(const std::string& folder) {
  models().folder = folder;
  add_reference(&kKernel);
}

}  // namespace pockc::ort
