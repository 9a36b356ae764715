#include "ort.h"

#include <dlfcn.h>

#include <cstdlib>

#include "error.h"

namespace pockc::ort {
namespace {

constexpr uint32_t kApiVersion = 20;  // the oldest ONNX Runtime that reads the models: 1.20

// Positions in the table of that version.
enum Function : int {
  kGetErrorMessage = 2,
  kCreateEnv = 3,
  kCreateSession = 7,
  kRun = 9,
  kCreateSessionOptions = 10,
  kSetIntraOpNumThreads = 24,
  kSetInterOpNumThreads = 25,
  kSessionGetInputCount = 30,
  kSessionGetOutputCount = 31,
  kSessionGetInputName = 36,
  kSessionGetOutputName = 37,
  kCreateTensorWithDataAsOrtValue = 49,
  kCreateCpuMemoryInfo = 69,
  kAllocatorFree = 76,
  kGetAllocatorWithDefaultOptions = 78,
  kReleaseStatus = 93,
  kReleaseValue = 96,
  kReleaseSessionOptions = 100,
  kAddSessionConfigEntry = 130,
};

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// What all models share.
struct Library {
  const void* const* api = nullptr;
  void* environment = nullptr;
  void* memory = nullptr;     // describes plain memory of the CPU
  void* allocator = nullptr;  // of the names that sessions return
};

Library library;

template <typename Result, typename... Arguments>
Result call(Function function, Arguments... arguments) {
  return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(library.api[function]))(arguments...);
}

// Calls a function that returns a status, which it turns into one of ours.
template <typename... Arguments>
Status checked(Status kind, Function function, Arguments... arguments) {
  void* status = call<void*>(function, arguments...);
  if (status == nullptr) return PK_OK;
  const std::string message = call<const char*>(kGetErrorMessage, static_cast<const void*>(status));
  call<void>(kReleaseStatus, status);
  return fail(kind, "ONNX Runtime: %s", message.c_str());
}

Status load_library() {
  if (library.api != nullptr) return PK_OK;
  const char* given = std::getenv("POCKC_ONNXRUNTIME");
  const char* file = given != nullptr ? given : "libonnxruntime.so.1";
  void* handle = dlopen(file, RTLD_NOW | RTLD_LOCAL);
  using GetBase = const ApiBase* (*)();
  const GetBase get_base =
      handle == nullptr ? nullptr : reinterpret_cast<GetBase>(dlsym(handle, "OrtGetApiBase"));
  if (get_base == nullptr) {
    return fail(
        PK_UNSUPPORTED,
        "cannot load ONNX Runtime: %s. Put libonnxruntime.so.1 beside this program, or its path into the "
        "environment variable POCKC_ONNXRUNTIME",
        dlerror());
  }
  library.api = get_base()->get_api(kApiVersion);
  if (library.api == nullptr) {
    return fail(PK_UNSUPPORTED, "%s is ONNX Runtime %s: version 1.20 or later is needed", file,
                get_base()->get_version());
  }
  constexpr int kWarning = 2, kArenaAllocator = 1, kDefaultMemory = 0;
  POCKC_TRY(checked(PK_UNSUPPORTED, kCreateEnv, kWarning, "pock-run", &library.environment));
  POCKC_TRY(checked(PK_UNSUPPORTED, kCreateCpuMemoryInfo, kArenaAllocator, kDefaultMemory, &library.memory));
  return checked(PK_UNSUPPORTED, kGetAllocatorWithDefaultOptions, &library.allocator);
}

// ONNXTensorElementDataType by DType.
int element_type(DType dtype) {
  static constexpr int kTypes[] = {1, 7, 6, 2, 9};
  return kTypes[static_cast<int>(dtype)];
}

int64_t element_size(DType dtype) {
  static constexpr int64_t kSizes[] = {4, 8, 4, 1, 1};
  return kSizes[static_cast<int>(dtype)];
}

Status make_value(const Tensor& tensor, void** out) {
  const size_t bytes = static_cast<size_t>(tensor.elements() * element_size(tensor.dtype));
  return checked(PK_BAD_FILE, kCreateTensorWithDataAsOrtValue, static_cast<const void*>(library.memory),
                 tensor.data, bytes, tensor.dims, static_cast<size_t>(tensor.rank),
                 element_type(tensor.dtype), out);
}

// No thread spins while it waits: the device has other things to do.
Status make_options(int threads, void** out) {
  POCKC_TRY(checked(PK_UNSUPPORTED, kCreateSessionOptions, out));
  POCKC_TRY(checked(PK_UNSUPPORTED, kSetIntraOpNumThreads, *out, threads));
  POCKC_TRY(checked(PK_UNSUPPORTED, kSetInterOpNumThreads, *out, 1));
  return checked(PK_UNSUPPORTED, kAddSessionConfigEntry, *out, "session.intra_op.allow_spinning", "0");
}

}  // namespace

Status Model::load(const std::string& file, int threads) {
  POCKC_TRY(load_library());
  void* options = nullptr;
  POCKC_TRY(make_options(threads, &options));
  const Status status = checked(PK_BAD_FILE, kCreateSession, static_cast<const void*>(library.environment),
                                file.c_str(), static_cast<const void*>(options), &session_);
  call<void>(kReleaseSessionOptions, options);
  POCKC_TRY(status);
  POCKC_TRY(read_names(true, &input_names_));
  return read_names(false, &output_names_);
}

Status Model::read_names(bool inputs, std::vector<std::string>* names) const {
  const void* session = session_;
  size_t count = 0;
  POCKC_TRY(checked(PK_BAD_FILE, inputs ? kSessionGetInputCount : kSessionGetOutputCount, session, &count));
  for (size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    const Function function = inputs ? kSessionGetInputName : kSessionGetOutputName;
    POCKC_TRY(checked(PK_BAD_FILE, function, session, i, library.allocator, &name));
    names->push_back(name);
    POCKC_TRY(checked(PK_BAD_FILE, kAllocatorFree, library.allocator, static_cast<void*>(name)));
  }
  return PK_OK;
}

void Model::release_values() {
  for (std::vector<void*>* values : {&inputs_, &outputs_}) {
    for (void* value : *values) call<void>(kReleaseValue, value);
    values->clear();
  }
  is_bound_ = false;
}

Status Model::bind(const Call& call) {
  const size_t inputs = static_cast<size_t>(call.input_count),
               outputs = static_cast<size_t>(call.output_count);
  if (inputs != input_names_.size() || outputs != output_names_.size()) {
    return fail(
        PK_BAD_FILE,
        "the model has %zu inputs and %zu outputs, the program gives %zu and %zu: they are not of one build",
        input_names_.size(), output_names_.size(), inputs, outputs);
  }
  release_values();
  for (size_t i = 0; i < inputs + outputs; ++i) {
    void* value = nullptr;
    POCKC_TRY(make_value(i < inputs ? call.inputs[i] : call.outputs[i - inputs], &value));
    (i < inputs ? inputs_ : outputs_).push_back(value);
  }
  bound_ = call.inputs;
  is_bound_ = true;
  return PK_OK;
}

Status Model::run() {
  std::vector<const char*> inputs, outputs;
  for (const std::string& name : input_names_) inputs.push_back(name.c_str());
  for (const std::string& name : output_names_) outputs.push_back(name.c_str());
  return checked(PK_INVALID_ARGUMENT, kRun, session_, static_cast<const void*>(nullptr), inputs.data(),
                 static_cast<const void* const*>(inputs_.data()), inputs.size(), outputs.data(),
                 outputs.size(), outputs_.data());
}

}  // namespace pockc::ort
