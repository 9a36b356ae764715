#include "program_writer.h"

#include <dirent.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "crc32.h"

namespace pockc::test {
namespace {

template <typename T>
void put(std::string* out, T value) {
  out->append(reinterpret_cast<const char*>(&value), sizeof(T));
}

void put_text(std::string* out, const std::string& text) {
  put<uint32_t>(out, static_cast<uint32_t>(text.size()));
  *out += text;
}

template <typename T>
void put_list(std::string* out, const std::vector<T>& list) {
  put<uint32_t>(out, static_cast<uint32_t>(list.size()));
  for (const T& item : list) put<T>(out, item);
}

void put_arguments(std::string* out, const std::vector<Argument>& arguments) {
  put<uint32_t>(out, static_cast<uint32_t>(arguments.size()));
  for (const Argument& argument : arguments) {
    put_text(out, argument.name);
    put<uint32_t>(out, argument.tensor);
  }
}

void put_entry(std::string* out, const WrittenEntry& entry) {
  put_text(out, entry.name);
  put_arguments(out, entry.inputs);
  put_arguments(out, entry.outputs);
  put<uint32_t>(out, static_cast<uint32_t>(entry.calls.size()));
  for (const WrittenCall& call : entry.calls) {
    put<uint32_t>(out, call.op);
    put<uint32_t>(out, call.origin);
    put_list(out, call.inputs);
    put_list(out, call.outputs);
    put_list(out, call.ints);
    put_list(out, call.floats);
    put<uint64_t>(out, call.workspace_offset);
    put<uint64_t>(out, call.workspace_bytes);
  }
}

uint64_t align(uint64_t value, uint64_t alignment) { return (value + alignment - 1) / alignment * alignment; }

}  // namespace

uint32_t ProgramWriter::intern(const std::string& text) {
  for (uint32_t i = 0; i < strings.size(); ++i) {
    if (strings[i] == text) return i;
  }
  strings.push_back(text);
  return static_cast<uint32_t>(strings.size()) - 1;
}

uint64_t ProgramWriter::append_data(const void* contents, uint64_t size) {
  data.resize(align(data.size(), 64), '\0');
  const uint64_t offset = data.size();
  data.append(static_cast<const char*>(contents), size);
  return offset;
}

uint32_t ProgramWriter::append_tensor(DType dtype, const std::vector<int64_t>& dims, Storage storage) {
  TensorRecord tensor;
  tensor.type.dtype = dtype;
  tensor.type.rank = static_cast<int32_t>(dims.size());
  for (size_t i = 0; i < dims.size(); ++i) tensor.type.dims[i] = dims[i];
  tensor.bytes = static_cast<uint64_t>(tensor.type.elements()) * dtype_size(dtype);
  tensor.storage = storage;
  tensors.push_back(tensor);
  return static_cast<uint32_t>(tensors.size()) - 1;
}

uint32_t ProgramWriter::transient(DType dtype, const std::vector<int64_t>& dims) {
  const uint32_t index = append_tensor(dtype, dims, Storage::kArena);
  tensors[index].offset = arena_bytes;
  arena_bytes = align(arena_bytes + tensors[index].bytes, 64);
  return index;
}

uint32_t ProgramWriter::constant(DType dtype, const std::vector<int64_t>& dims, const void* contents) {
  const uint32_t index = append_tensor(dtype, dims, Storage::kData);
  tensors[index].offset = append_data(contents, tensors[index].bytes);
  return index;
}

uint32_t ProgramWriter::state(const std::string& name, StateKind kind, DType dtype,
                              const std::vector<int64_t>& dims, const void* initial,
                              const std::vector<uint8_t>& permutation) {
  const uint32_t index = transient(dtype, dims);
  state_bytes = arena_bytes;
  StateRecord record;
  record.name = name;
  record.kind = kind;
  record.is_mutable = true;
  record.trained = kind == StateKind::kParameter;
  record.permutation_rank = static_cast<uint8_t>(permutation.size());
  for (size_t i = 0; i < permutation.size(); ++i) record.permutation[i] = permutation[i];
  record.tensor = index;
  record.initial = append_data(initial, tensors[index].bytes);
  states.push_back(record);
  return index;
}

WrittenCall ProgramWriter::call(const std::string& op, const std::vector<uint32_t>& inputs,
                                const std::vector<uint32_t>& outputs, const std::vector<int64_t>& ints,
                                const std::vector<double>& floats) {
  WrittenCall record;
  record.op = intern(op);
  record.origin = intern("test." + op + " (model.py:7)");
  record.inputs = inputs;
  record.outputs = outputs;
  record.ints = ints;
  record.floats = floats;
  return record;
}

std::string ProgramWriter::program_section() const {
  std::string out;
  put<uint64_t>(&out, state_bytes);
  put<uint64_t>(&out, arena_bytes);
  put<uint32_t>(&out, max_threads);
  put<uint32_t>(&out, accumulation);
  put<uint32_t>(&out, static_cast<uint32_t>(tensors.size()));
  for (const TensorRecord& tensor : tensors) {
    put<uint8_t>(&out, static_cast<uint8_t>(tensor.type.dtype));
    put<uint8_t>(&out, static_cast<uint8_t>(tensor.storage));
    put<uint8_t>(&out, static_cast<uint8_t>(tensor.type.rank));
    put<uint8_t>(&out, 0);
    for (int i = 0; i < tensor.type.rank; ++i) put<int64_t>(&out, tensor.type.dims[i]);
    put<uint64_t>(&out, tensor.offset);
  }
  put<uint32_t>(&out, static_cast<uint32_t>(states.size()));
  for (const StateRecord& state : states) {
    put_text(&out, state.name);
    put<uint8_t>(&out, static_cast<uint8_t>(state.kind));
    put<uint8_t>(&out, state.is_mutable ? 1 : 0);
    put<uint8_t>(&out, state.permutation_rank);
    out.append(reinterpret_cast<const char*>(state.permutation), state.permutation_rank);
    put<uint32_t>(&out, state.tensor);
    put<uint64_t>(&out, state.initial);
    put<uint8_t>(&out, state.trained ? 1 : 0);
  }
  put<uint32_t>(&out, static_cast<uint32_t>(strings.size()));
  for (const std::string& text : strings) put_text(&out, text);
  put<uint32_t>(&out, static_cast<uint32_t>(entries.size()));
  for (const WrittenEntry& entry : entries) put_entry(&out, entry);
  return out;
}

std::string ProgramWriter::bytes() const {
  return make_file(metadata, program_section(), data, golden, hash_seed);
}

std::string make_file(const std::string& metadata, const std::string& program, const std::string& data,
                      const std::string& golden, uint8_t hash_seed) {
  std::vector<std::pair<uint32_t, const std::string*>> sections = {{1, &metadata}, {2, &program}, {3, &data}};
  if (!golden.empty()) sections.emplace_back(4, &golden);
  std::string table;
  uint64_t offset = 64 + 24 * sections.size();
  for (const auto& section : sections) {
    offset = align(offset, section.first == 3 ? 4096 : 64);
    put<uint32_t>(&table, section.first);
    put<uint32_t>(&table, crc32(0, section.second->data(), section.second->size()));
    put<uint64_t>(&table, offset);
    put<uint64_t>(&table, section.second->size());
    offset += section.second->size();
  }
  std::string file("\x89POCK\r\n\x1a", 8);
  put<uint32_t>(&file, 1);
  put<uint32_t>(&file, static_cast<uint32_t>(sections.size()));
  put<uint64_t>(&file, offset);
  put<uint32_t>(&file, crc32(0, table.data(), table.size()));
  put<uint32_t>(&file, crc32(0, file.data(), file.size()));
  file.append(32, static_cast<char>(hash_seed));
  file += table;
  for (const auto& section : sections) {
    file.resize(align(file.size(), section.first == 3 ? 4096 : 64), '\0');
    file += *section.second;
  }
  return file;
}

ProgramWriter mean_program(uint32_t accumulation) {
  ProgramWriter writer;
  writer.accumulation = accumulation;
  const float weight[4] = {1, 2, 3, 4};
  const float table[6] = {0, 2, 4, 1, 3, 5};  // of the original [[0, 1], [2, 3], [4, 5]]
  const float rate = 0.25f, frozen[4] = {9, 8, 7, 6}, zeros[4] = {};
  const int64_t zero = 0, one = 1;
  const uint32_t w = writer.state("weight", StateKind::kParameter, DType::kF32, {4}, weight);
  writer.state("table", StateKind::kParameter, DType::kF32, {2, 3}, table, {1, 0});
  const uint32_t step = writer.state("pockc.step", StateKind::kCounter, DType::kI64, {}, &zero);
  const uint32_t lr = writer.state("pockc.learning_rate", StateKind::kBuffer, DType::kF32, {}, &rate);
  const uint32_t sum = writer.state("weight.accumulated", StateKind::kSlot, DType::kF32, {4}, zeros);
  const uint32_t constant_frozen = writer.constant(DType::kF32, {4}, frozen);
  StateRecord record;
  record.name = "frozen";
  record.tensor = constant_frozen;
  record.initial = writer.tensors[constant_frozen].offset;
  writer.states.push_back(record);
  const uint32_t constant_one = writer.constant(DType::kI64, {}, &one);
  const float half[2] = {0.5f, 0.5f};
  const uint32_t mean_row = writer.constant(DType::kF32, {1, 2}, half);
  const float ones[4] = {1, 1, 1, 1};
  const uint32_t column = writer.constant(DType::kF32, {4, 1}, ones);

  const uint32_t x = writer.transient(DType::kF32, {2, 4});
  const uint32_t labels = writer.transient(DType::kI64, {2});
  const uint32_t difference = writer.transient(DType::kF32, {2, 4});
  const uint32_t square = writer.transient(DType::kF32, {2, 4});
  const uint32_t mean = writer.transient(DType::kF32, {1, 4});
  const uint32_t loss = writer.transient(DType::kF32, {1, 1});
  const uint32_t logits = writer.transient(DType::kF32, {2, 4});
  // Views of the same bytes without the leading axes of length 1.
  uint32_t gradient = writer.transient(DType::kF32, {4});
  uint32_t scalar = writer.transient(DType::kF32, {});
  const uint32_t rows = writer.transient(DType::kF32, {1, 4});

  const std::vector<int64_t> plain = {0, 0, 0};  // matmul: transpose_a, transpose_b, activation
  const std::vector<double> bounds = {0, 0};
  const std::vector<WrittenCall> forward = {
      writer.call("sub", {w, x}, {difference}),
      writer.call("mul", {difference, difference}, {square}),
      writer.call("matmul", {mean_row, square}, {rows}, plain, bounds),
      writer.call("matmul", {rows, column}, {loss}, plain, bounds),
      writer.call("reshape", {loss}, {scalar}, {0}),
  };
  const std::vector<WrittenCall> backward = {
      writer.call("matmul", {mean_row, difference}, {mean}, plain, bounds),
      writer.call("reshape", {mean}, {gradient}, {1, 4}),
  };
  const WrittenCall predict = writer.call("mul", {x, w}, {logits});

  WrittenEntry train{"train_step", {{"pixel_values", x}, {"labels", labels}}, {{"loss", scalar}}, forward};
  train.calls.insert(train.calls.end(), backward.begin(), backward.end());
  WrittenEntry accumulate = train;
  accumulate.name = "accumulate";
  accumulate.calls.push_back(writer.call("add", {sum, gradient}, {sum}));
  if (accumulation > 1) {
    train.calls.push_back(writer.call("add", {gradient, sum}, {gradient}));
    train.calls.push_back(writer.call("sub", {sum, sum}, {sum}));
  }
  train.calls.push_back(writer.call("sgd", {w, gradient, lr}, {w}, {0, -1}, {0.0}));
  train.calls.push_back(writer.call("add", {step, constant_one}, {step}));

  WrittenEntry evaluate = train;
  evaluate.name = "eval_step";
  evaluate.calls = forward;
  evaluate.calls.push_back(predict);
  evaluate.outputs.push_back({"logits", logits});
  const WrittenEntry infer{"infer", {{"pixel_values", x}}, {{"logits", logits}}, {predict}};

  writer.entries = {train, evaluate, infer};
  if (accumulation > 1) writer.entries.push_back(accumulate);
  return writer;
}

// In memory where that is possible: the tests write tens of thousands of files.
TemporaryDirectory::TemporaryDirectory() {
  for (const char* parent : {"/dev/shm", "/tmp"}) {
    std::string name = std::string(parent) + "/pockc-test-XXXXXX";
    if (mkdtemp(&name[0]) == nullptr) continue;
    directory_ = name;
    return;
  }
  std::abort();
}

TemporaryDirectory::~TemporaryDirectory() {
  for (const std::string& name : list()) unlink(path(name).c_str());
  rmdir(directory_.c_str());
}

std::vector<std::string> TemporaryDirectory::list() const {
  std::vector<std::string> names;
  DIR* directory = opendir(directory_.c_str());
  if (directory == nullptr) return names;
  while (const dirent* item = readdir(directory)) {
    const std::string name = item->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  closedir(directory);
  return names;
}

void write_file(const std::string& path, const std::string& contents) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr) return;
  std::fwrite(contents.data(), 1, contents.size(), file);
  std::fclose(file);
}

std::string read_file(const std::string& path) {
  std::string contents;
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (file == nullptr) return contents;
  char buffer[4096];
  for (size_t size; (size = std::fread(buffer, 1, sizeof(buffer), file)) > 0;) contents.append(buffer, size);
  std::fclose(file);
  return contents;
}

}  // namespace pockc::test
