// The .pock reader, and what runs a program that it accepts: its checks are all that stands between a file
// and the kernels' pointers.
#include <algorithm>
#include <cstring>
#include <memory>

#include "crc32.h"
#include "fuzz.h"
#include "json.h"
#include "program_writer.h"
#include "safetensors.h"
#include "session.h"

namespace pockc::fuzz {
namespace {

constexpr uint64_t kMaxArena = 1u << 20;  // larger ones are legal, and slow
constexpr double kMaxWork = 2e7;          // multiplications of one call, about
#if defined(POCKC_WITHOUT_BASELINE)
constexpr bool kOnlyReference = true;  // this build has no vectorised kernels
#else
constexpr bool kOnlyReference = false;
#endif

// Gives the header and the sections the sums that they should have, as far as they lie inside: changes of
// what they cover then get past the first check.
void repair(PageCopy* file) {
  uint8_t* data = file->data();
  if (file->size() < 64) return;
  const uint64_t count = std::min<uint64_t>(get<uint32_t>(data + 12), (file->size() - 64) / 24);
  for (uint64_t i = 0; i < count; ++i) {
    uint8_t* row = data + 64 + 24 * i;
    const uint64_t offset = get<uint64_t>(row + 8), size = get<uint64_t>(row + 16);
    if (offset <= file->size() && size <= file->size() - offset) put(row + 4, crc32(0, data + offset, size));
  }
  put<uint64_t>(data + 16, file->size());
  put(data + 24, crc32(0, data + 64, count * 24));
  put(data + 28, crc32(0, data, 28));
}

// The product of the elements of all operands but the smallest ones bounds what any kernel does.
bool is_small(const Program& program) {
  if (program.arena_bytes > kMaxArena) return false;
  for (const EntryRecord& entry : program.entries) {
    for (const CallRecord& call : entry.calls) {
      double largest = 1, second = 1;
      for (const Span<uint32_t>& list : {entry.inputs_of(call), entry.outputs_of(call)}) {
        for (const uint32_t index : list) {
          const double elements = static_cast<double>(program.tensors[index].type.elements());
          second = std::max(second, std::min(largest, elements));
          largest = std::max(largest, elements);
        }
      }
      if (largest * second > kMaxWork) return false;
    }
  }
  return true;
}

void run_entries(const Program& program, Session* session) {
  for (const EntryRecord& entry : program.entries) {
    std::vector<const char*> names;
    std::vector<pk_tensor> tensors(entry.inputs.size());
    bool ready = true;
    for (size_t i = 0; i < entry.inputs.size(); ++i) {
      names.push_back(entry.inputs[i].name.c_str());
      ready = ready && session->input(entry.name.c_str(), names[i], &tensors[i]) == PK_OK;
      if (ready) std::memset(tensors[i].data, 1, program.tensors[entry.inputs[i].tensor].bytes);
    }
    if (!ready) continue;
    session->run(entry.name.c_str(), names.data(), tensors.data(), static_cast<int32_t>(tensors.size()),
                 nullptr, nullptr, 0);
  }
}

// The memory of one call: every operand and the workspace in a block of its own that ends where they end, so
// that a kernel which leaves its operands is seen even where the arena goes on. Operands at the same place
// share it.
class Apart {
 public:
  Apart(const Program& program, const EntryRecord& entry, const CallRecord& record) {
    for (const uint32_t index : entry.inputs_of(record)) add(program, index, &inputs_);
    for (const uint32_t index : entry.outputs_of(record)) add(program, index, &outputs_);
    for (const Tensor& tensor : inputs_) list_.push_back(&tensor);
    for (const Tensor& tensor : outputs_) list_.push_back(&tensor);
    call_.inputs = Operands(list_.data());
    call_.input_count = static_cast<int32_t>(inputs_.size());
    call_.outputs = Operands(list_.data() + inputs_.size());
    call_.output_count = static_cast<int32_t>(outputs_.size());
    call_.ints = entry.ints.data() + record.ints.first;
    call_.int_count = static_cast<int32_t>(record.ints.count);
    call_.floats = entry.floats.data() + record.floats.first;
    call_.float_count = static_cast<int32_t>(record.floats.count);
    call_.workspace_bytes = record.workspace_bytes;
    if (record.workspace_bytes > 0) call_.workspace = block(record.workspace_bytes);
  }

  Call& call() { return call_; }

 private:
  void add(const Program& program, uint32_t index, std::vector<Tensor>* operands) {
    const TensorRecord& tensor = program.tensors[index];
    operands->push_back(tensor.type);
    for (const auto& known : places_) {
      const TensorRecord& other = program.tensors[known.first];
      if (other.storage != tensor.storage || other.offset != tensor.offset || other.bytes < tensor.bytes)
        continue;
      operands->back().data = known.second;
      return;
    }
    operands->back().data = block(tensor.bytes);
    if (tensor.storage == Storage::kData)
      std::memcpy(operands->back().data, program.data.data + tensor.offset, tensor.bytes);
    places_.emplace_back(index, operands->back().data);
  }

  void* block(uint64_t bytes) {
    const std::string ones(bytes, '\1');
    blocks_.push_back(std::make_unique<PageCopy>(reinterpret_cast<const uint8_t*>(ones.data()), bytes));
    return blocks_.back()->data();
  }

  std::vector<Tensor> inputs_, outputs_;
  std::vector<const Tensor*> list_;  // of inputs, then outputs
  std::vector<std::pair<uint32_t, void*>> places_;
  std::vector<std::unique_ptr<PageCopy>> blocks_;
  Call call_;
};

void run_calls_apart(const Program& program) {
  static ThreadPool pool(1);
  for (const EntryRecord& entry : program.entries) {
    for (const CallRecord& record : entry.calls) {
      const char* op = program.strings[record.op].c_str();
      const KernelEntry* kernels[] = {find_reference(op), find_simd(op, nullptr)};
      Apart apart(program, entry, record);
      apart.call().pool = &pool;
      if (kernels[0]->check(apart.call()) != PK_OK) continue;
      kernels[0]->run(apart.call());
      if (kernels[1] != nullptr && kernels[1]->accepts(apart.call())) kernels[1]->run(apart.call());
    }
  }
}

// Whether the reader accepts it.
bool load_and_run(const PageCopy& file) {
  Program program;
  program.file.borrow(file.bytes().data, file.size());
  if (read_program("a.pock", &program) != PK_OK) return false;
  Json metadata;
  parse_json(reinterpret_cast<const char*>(program.metadata.data), program.metadata.size, &metadata);
  SafetensorsFile golden;
  read_safetensors("golden", program.golden, &golden);
  if (!is_small(program)) return true;
  for (const bool reference_only : {true, false}) {
    if (!reference_only && kOnlyReference) break;
    SessionSettings settings;
    settings.reference_only = reference_only;
    Session session;
    if (session.create(program, settings) != PK_OK) return true;
    run_entries(program, &session);
    for (const StateRecord& state : program.states) {
      if (state.is_mutable) session.is_finite(state);
    }
    if (reference_only) run_calls_apart(program);
  }
  return true;
}

}  // namespace

std::vector<std::string> fuzz_seeds() {
  test::ProgramWriter golden = test::mean_program();
  golden.golden = safetensors_header({}, {});
  return {test::mean_program().bytes(), test::mean_program(3).bytes(), golden.bytes()};
}

// The tables: the section with the number 2.
Focus fuzz_focus(const std::string& input) {
  const uint8_t* data = reinterpret_cast<const uint8_t*>(input.data());
  for (size_t row = 64; row + 24 <= input.size() && row < 64 + 24 * 4; row += 24) {
    const uint64_t offset = get<uint64_t>(data + row + 8), size = get<uint64_t>(data + row + 16);
    if (get<uint32_t>(data + row) != 2 || offset > input.size() || size > input.size() - offset) continue;
    return Focus{static_cast<size_t>(offset), static_cast<size_t>(size)};
  }
  return Focus{0, input.size()};
}

}  // namespace pockc::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  pockc::fuzz::PageCopy file(data, size);
  if (pockc::fuzz::load_and_run(file)) return 0;
  pockc::fuzz::repair(&file);
  pockc::fuzz::load_and_run(file);
  return 0;
}
