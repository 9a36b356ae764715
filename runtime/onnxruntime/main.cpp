// pock-run-onnxruntime: the commands of pock-run for programs whose steps are ONNX models. The models lie
// beside the .pock file, libonnxruntime.so.1 beside this program or where POCKC_ONNXRUNTIME says.
#include "commands.h"
#include "kernel.h"

int main(int argc, char** argv) {
  pockc::cli::Options options;
  std::string error;
  // A mistake in the arguments is reported by dispatch.
  if (pockc::cli::parse_arguments(argc, argv, &options, &error)) {
    const size_t end = options.model.find_last_of('/');
    pockc::ort::add_kernel(end == std::string::npos ? "" : options.model.substr(0, end + 1));
  }
  return pockc::cli::dispatch(argc, argv);
}
