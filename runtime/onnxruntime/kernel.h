// The op `onnxruntime` of .pock files: a whole entry as one call, which runs the model of that entry.
#ifndef POCKC_ONNXRUNTIME_KERNEL_H_
#define POCKC_ONNXRUNTIME_KERNEL_H_

#include <string>

namespace pockc::ort {

// Lets programs have the op. Their models are in `folder`: train_step.onnx and so on, loaded when first run.
void add_kernel(const std::string& folder);

}  // namespace pockc::ort

#endif  // POCKC_ONNXRUNTIME_KERNEL_H_
