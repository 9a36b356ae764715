// The few functions of ONNX Runtime's C interface that running a model takes.
//
// libonnxruntime has one exported function that matters, OrtGetApiBase, and behind it a table of function
// pointers that only ever grows at its end. So a function is its position in that table, and no header is
// needed to build.
#ifndef POCKC_ONNXRUNTIME_ORT_H_
#define POCKC_ONNXRUNTIME_ORT_H_

#include <string>
#include <vector>

#include "pockc/kernel.h"

namespace pockc::ort {

// A model that was loaded, with the memory of its arguments bound once. Not to be copied; lives as long as
// the process.
class Model {
 public:
  // Loads libonnxruntime, the first time, and the model. Errors are PK_UNSUPPORTED and PK_BAD_FILE.
  Status load(const std::string& file, int threads);
  // Takes the arguments, in the order of the model, at the addresses that they have now.
  Status bind(const Call& call);
  Status run();

  bool is_bound_to(const Call& call) const { return is_bound_ && bound_ == call.inputs; }

 private:
  void release_values();
  Status read_names(bool inputs, std::vector<std::string>* names) const;

  void* session_ = nullptr;
  bool is_bound_ = false;
  Operands bound_;  // that the values are made of
  std::vector<std::string> input_names_, output_names_;
  std::vector<void*> inputs_, outputs_;  // OrtValue*
};

}  // namespace pockc::ort

#endif  // POCKC_ONNXRUNTIME_ORT_H_
