// selftest: the program's golden vectors. Tensors of the section are named `<entry>/input/<name>` and
// `<entry>/output/<name>`; each entry runs once from the initial states.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "commands.h"
#include "error.h"
#include "safetensors.h"

namespace pockc::cli {
namespace {

constexpr double kTolerance = 1e-4;        // of the largest expected value
constexpr double kHalfTolerance = 0x1p-6;  // the same where products are in 16 bits

bool multiplies_halves(const Program& program) { return half_arithmetic(program.half_arithmetic) != nullptr; }

template <typename T>
T element(const void* data, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

// The largest difference over the largest expected value; for other dtypes than float32, 0 or infinity.
double compare(const Tensor& wanted, const pk_tensor& got, size_t bytes) {
  if (wanted.dtype != DType::kF32) return std::memcmp(wanted.data, got.data, bytes) == 0 ? 0 : INFINITY;
  double largest = 1e-30, difference = 0;
  for (int64_t i = 0; i < wanted.elements(); ++i) {
    const double a = static_cast<double>(element<float>(wanted.data, i));
    const double b = static_cast<double>(element<float>(got.data, i));
    if (a == b || (std::isnan(a) && std::isnan(b))) continue;
    if (!std::isfinite(a) || !std::isfinite(b)) return INFINITY;
    difference = std::fmax(difference, std::fabs(a - b));
    largest = std::fmax(largest, std::fmax(std::fabs(a), std::fabs(b)));
  }
  return difference / largest;
}

bool same_type(const Tensor& a, const pk_tensor& b) {
  bool same = static_cast<int>(a.dtype) == static_cast<int>(b.dtype) && a.rank == b.rank;
  for (int axis = 0; same && axis < a.rank; ++axis) same = a.dims[axis] == b.dims[axis];
  return same;
}

const SafetensorsFile::Item* find_golden(const SafetensorsFile& golden, const EntryRecord& entry,
                                         const char* role, const Output& value) {
  const SafetensorsFile::Item* item = golden.find(entry.name + "/" + role + "/" + value.name);
  return item != nullptr && same_type(item->type, value.tensor) ? item : nullptr;
}

// Runs one entry in a session of its own and compares. `failures` counts outputs that differ.
Status test_entry(const Program& program, int threads, const SafetensorsFile& golden,
                  const EntryRecord& entry, int* failures) {
  std::vector<Output> inputs, outputs;
  std::vector<const SafetensorsFile::Item*> wanted;
  for (const Argument& argument : entry.inputs) {
    inputs.emplace_back(program, argument);
    const SafetensorsFile::Item* item = find_golden(golden, entry, "input", inputs.back());
    if (item == nullptr)
      return fail(PK_BAD_FILE, "the golden section has no input `%s` of `%s`", argument.name.c_str(),
                  entry.name.c_str());
    std::memcpy(inputs.back().tensor.data, item->type.data, item->bytes);
  }
  for (const Argument& argument : entry.outputs) {
    Output output(program, argument);
    const SafetensorsFile::Item* item = find_golden(golden, entry, "output", output);
    if (item == nullptr) continue;
    outputs.push_back(std::move(output));
    wanted.push_back(item);
  }
  std::vector<const char*> input_names, output_names;
  std::vector<pk_tensor> input_tensors, output_tensors;
  for (Output& input : inputs) input_names.push_back(input.name), input_tensors.push_back(input.tensor);
  for (Output& output : outputs) output_names.push_back(output.name), output_tensors.push_back(output.tensor);
  SessionSettings settings;
  settings.threads = threads;
  Session session;
  POCKC_TRY(session.create(program, settings));
  POCKC_TRY(session.run(entry.name.c_str(), input_names.data(), input_tensors.data(),
                        static_cast<int32_t>(input_tensors.size()), output_names.data(),
                        output_tensors.data(), static_cast<int32_t>(output_tensors.size())));
  for (size_t i = 0; i < outputs.size(); ++i) {
    const double difference = compare(wanted[i]->type, output_tensors[i], wanted[i]->bytes);
    const bool good = difference <= (multiplies_halves(program) ? kHalfTolerance : kTolerance);
    std::printf("%s %s/%s  relative difference %.1e\n", good ? "ok  " : "FAIL", entry.name.c_str(),
                outputs[i].name, difference);
    *failures += good ? 0 : 1;
  }
  return PK_OK;
}

bool has_golden(const SafetensorsFile& golden, const EntryRecord& entry) {
  const std::string prefix = entry.name + "/";
  for (const SafetensorsFile::Item& item : golden.items) {
    if (item.name.compare(0, prefix.size(), prefix) == 0) return true;
  }
  return false;
}

Status test_all(const Options& options, int* failures, const char** products) {
  Program program;
  POCKC_TRY(load_program(options.model.c_str(), &program));
  *products = half_arithmetic(program.half_arithmetic);
  if (program.golden.data == nullptr) {
    return fail(PK_NOT_FOUND, "%s holds no golden vectors: rebuild it with them", options.model.c_str());
  }
  SafetensorsFile golden;
  POCKC_TRY(read_safetensors("the golden section", program.golden, &golden));
  int tested = 0;
  for (const EntryRecord& entry : program.entries) {
    if (!has_golden(golden, entry)) continue;
    // `train_step` of a program that accumulates is several entries in one: it has no golden vectors of its
    // own.
    if (program.accumulation > 1 && (entry.name == "train_step" || entry.name == "accumulate")) continue;
    POCKC_TRY(test_entry(program, static_cast<int>(options.threads), golden, entry, failures));
    ++tested;
  }
  if (tested == 0)
    return fail(PK_NOT_FOUND, "%s holds golden vectors of none of its entries", options.model.c_str());
  return PK_OK;
}

}  // namespace

int selftest(const Options& options) {
  int failures = 0;
  const char* products = nullptr;
  if (test_all(options, &failures, &products) != PK_OK) return report_failure();
  std::printf("%s (instruction set %s%s%s)\n", failures == 0 ? "selftest passed" : "selftest FAILED",
              best_isa(), products == nullptr ? "" : ", products in ", products == nullptr ? "" : products);
  return failures == 0 ? 0 : 1;
}

}  // namespace pockc::cli
