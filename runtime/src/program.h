// A loaded .pock file: tables of tensors, states and entries, all checked; contents stay in the mapping.
#ifndef POCKC_SRC_PROGRAM_H_
#define POCKC_SRC_PROGRAM_H_

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "compact.h"
#include "file.h"
#include "pockc/kernel.h"

namespace pockc {

constexpr uint32_t kFormatVersion = 3;  // and below
constexpr size_t kHashBytes = 32;

enum class Storage : uint8_t { kArena = 0, kData = 1 };
enum class StateKind : uint8_t { kParameter = 0, kBuffer = 1, kConstant = 2, kSlot = 3, kCounter = 4 };

// Of one element; compact weights have none of their own.
constexpr size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kF16:
    case DType::kB16:
      return 2;
    default:
      return 1;
  }
}

const char* dtype_name(DType dtype);

struct TensorRecord {
  Tensor type;  // data is null: it depends on the session
  Storage storage = Storage::kArena;
  uint64_t offset = 0;
  uint64_t bytes = 0;

  uint64_t end() const { return offset + bytes; }
};

struct StateRecord {
  std::string name;
  StateKind kind = StateKind::kParameter;
  bool is_mutable = false;
  bool trained = false;
  uint8_t permutation_rank = 0;        // 0: identity
  uint8_t permutation[kMaxRank] = {};  // stored == original.transpose(permutation)
  uint32_t tensor = 0;
  uint64_t initial = 0;  // offset into DATA

  // Shape and dtype, as the user sees them, of the tensor that is stored as `stored`.
  Tensor original_type(const Tensor& stored) const;
};

struct Argument {
  std::string name;
  uint32_t tensor;
};

// Neighbours in an array.
struct Range {
  uint32_t first = 0;
  uint32_t count = 0;
};

template <typename T>
class Span {
 public:
  Span(const std::vector<T>& array, Range range) : data_(array.data() + range.first), size_(range.count) {}
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  const T& operator[](size_t index) const { return data_[index]; }

 private:
  const T* data_;
  size_t size_;
};

// There are thousands of calls: a vector for each list would take more memory than what is in it.
struct CallRecord {
  uint32_t op = 0;      // index into strings
  uint32_t origin = 0;  // index into strings
  Range inputs;         // in EntryRecord::operands
  Range outputs;
  Range ints;
  Range floats;
  uint64_t workspace_offset = 0;
  uint64_t workspace_bytes = 0;
};

struct EntryRecord {
  std::string name;
  std::vector<Argument> inputs;
  std::vector<Argument> outputs;
  std::vector<CallRecord> calls;
  std::vector<uint32_t> operands;  // indices of tensors, of all calls
  std::vector<int64_t> ints;       // attributes; calls with the same list share it
  std::vector<double> floats;

  Span<uint32_t> inputs_of(const CallRecord& call) const { return {operands, call.inputs}; }
  Span<uint32_t> outputs_of(const CallRecord& call) const { return {operands, call.outputs}; }
};

struct Bytes {
  const uint8_t* data = nullptr;
  uint64_t size = 0;
};

struct Program {
  MappedFile file;
  uint8_t hash[kHashBytes] = {};
  Bytes metadata;
  Bytes data;    // the DATA section
  Bytes golden;  // the GOLDEN section; empty when there is none
  // Products of f16 are multiplied in 16 bits where the CPU can: the HALF_ARITHMETIC section is there.
  DType half_arithmetic = DType::kF32;  // kF16 or kB16: products of these as such, where the CPU can

  uint64_t state_bytes = 0;
  uint64_t arena_bytes = 0;
  uint32_t max_threads = 1;
  uint32_t accumulation = 1;
  std::vector<TensorRecord> tensors;
  std::vector<StateRecord> states;
  std::vector<std::string> strings;
  std::vector<EntryRecord> entries;

  const EntryRecord* find_entry(const char* name) const;
  const StateRecord* find_state(const char* name) const;
  // The metadata with a NUL behind it: copied when somebody asks, since training does not need it.
  const char* metadata_text() const;

 private:
  mutable std::once_flag metadata_copied_;
  mutable std::string metadata_copy_;
};

// Maps and checks the file at `path`. `program` is new and of no use after a failure.
Status load_program(const char* path, Program* program);
// The same for `program->file` that is open; `path` names it in messages.
Status read_program(const char* path, Program* program);

// Fills the tables from the PROGRAM section (program_reader.cpp), then checks what crosses tables
// (program_check.cpp).
Status read_program_section(Bytes section, Program* program);
Status check_program(const Program& program);

}  // namespace pockc

#endif  // POCKC_SRC_PROGRAM_H_
