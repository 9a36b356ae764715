// The tables of the PROGRAM section. Field ranges are checked here; references between tables in
// program_check.cpp.
#include <cstring>

#include "byte_reader.h"
#include "crc32.h"
#include "error.h"
#include "half.h"
#include "program.h"

namespace pockc {
namespace {

constexpr uint32_t kMaxTensors = 1u << 20;
constexpr uint32_t kMaxStates = 1u << 16;
constexpr uint32_t kMaxCalls = 1u << 20;
constexpr uint32_t kMaxStrings = 1u << 20;
constexpr uint32_t kMaxEntries = 64;
constexpr uint32_t kMaxText = 4096;
constexpr uint32_t kMaxOperands = 1u << 14;
constexpr uint32_t kMaxAttributes = 256;
constexpr uint32_t kMaxArguments = 1u << 16;
constexpr uint64_t kMaxBytes = 1ull << 40;
constexpr uint8_t kMaxDType = static_cast<uint8_t>(DType::kB16);

Status truncated(const char* table, size_t index) {
  return fail(PK_BAD_FILE, "the program section is corrupt: %s %zu is cut off or out of range", table, index);
}

// Of at most kMaxBytes elements: no row takes more than 20 bytes an element.
uint64_t compact_bytes(const Tensor& type) {
  const int64_t columns = type.elements() / type.dims[0];
  return static_cast<uint64_t>(type.dims[0]) * static_cast<uint64_t>(row_bytes(type.dtype, columns));
}

Status read_tensor(ByteReader& reader, size_t index, TensorRecord* record) {
  const uint8_t dtype = reader.u8();
  const uint8_t storage = reader.u8();
  const uint8_t rank = reader.u8();
  const uint8_t zero = reader.u8();
  if (reader.failed() || dtype > kMaxDType || storage > 1 || rank > kMaxRank || zero != 0)
    return truncated("tensor", index);
  if (!POCKC_HALVES && dtype >= static_cast<uint8_t>(DType::kF16)) {
    return fail(PK_BAD_FILE,
                "tensor %zu has 16 bits, and this pock-run was made for a program without such tensors",
                index);
  }
  record->type.dtype = static_cast<DType>(dtype);
  record->type.rank = rank;
  record->storage = static_cast<Storage>(storage);
  record->bytes = dtype_size(record->type.dtype);
  const bool compact = is_compact(record->type.dtype);
  if (compact && (rank < 2 || record->storage != Storage::kData)) return truncated("tensor", index);
  for (int axis = 0; axis < rank; ++axis) {
    const int64_t size = reader.i64();
    if (size < 1 || static_cast<uint64_t>(size) > kMaxBytes / record->bytes)
      return truncated("tensor", index);
    record->type.dims[axis] = size;
    record->bytes *= static_cast<uint64_t>(size);
  }
  if (compact) record->bytes = compact_bytes(record->type);
  record->offset = reader.u64();
  if (reader.failed() || record->offset % kAlignment != 0) return truncated("tensor", index);
  return PK_OK;
}

Status read_state(ByteReader& reader, size_t index, StateRecord* record) {
  record->name = reader.text(kMaxText);
  const uint8_t kind = reader.u8();
  const uint8_t is_mutable = reader.u8();
  const uint8_t rank = reader.u8();
  if (reader.failed() || kind > 4 || is_mutable > 1 || rank > kMaxRank) return truncated("state", index);
  record->kind = static_cast<StateKind>(kind);
  record->is_mutable = is_mutable != 0;
  record->permutation_rank = rank;
  unsigned seen = 0;
  for (int axis = 0; axis < rank; ++axis) {
    record->permutation[axis] = reader.u8();
    if (record->permutation[axis] >= rank) return truncated("state", index);
    seen |= 1u << record->permutation[axis];
  }
  if (seen != (1u << rank) - 1) return truncated("state", index);
  record->tensor = reader.u32();
  record->initial = reader.u64();
  const uint8_t trained = reader.u8();
  if (reader.failed() || trained > 1 || record->initial % kAlignment != 0) return truncated("state", index);
  record->trained = trained != 0;
  return PK_OK;
}

template <typename T, typename Read>
void read_list(ByteReader& reader, uint32_t limit, uint64_t item_bytes, std::vector<T>* list, Read read) {
  const uint32_t count = reader.count(limit, item_bytes);
  list->resize(count);
  for (T& item : *list) item = read();
}

// Appends a list to the array of its entry.
template <typename T, typename Read>
Range append_list(ByteReader& reader, uint32_t limit, std::vector<T>* array, Read read) {
  const Range range{static_cast<uint32_t>(array->size()), reader.count(limit, sizeof(T))};
  for (uint32_t i = 0; i < range.count; ++i) array->push_back(read());
  return range;
}

// Lists of attributes that an entry has already. The same layer on another micro-batch, or another strip of
// rows, has the same attributes: of the lists of a large program few are distinct.
class KnownLists {
 public:
  // The earlier range with the same elements as `last`, which is at the end of the array and goes away then.
  template <typename T>
  Range shared(Range last, std::vector<T>* array) {
    if (last.count == 0) return last;
    const T* elements = array->data() + last.first;
    const size_t bytes = last.count * sizeof(T);
    Range& known = slots_[crc32(0, elements, bytes) % kSlots];
    if (known.count != last.count || std::memcmp(array->data() + known.first, elements, bytes) != 0)
      return known = last;
    array->resize(last.first);
    return known;
  }

 private:
  static constexpr uint32_t kSlots = 512;  // of two lists with one slot the later one is known
  std::vector<Range> slots_ = std::vector<Range>(kSlots);
};

Status read_call(ByteReader& reader, size_t index, EntryRecord* entry, KnownLists* ints, KnownLists* floats) {
  CallRecord* call = &entry->calls[index];
  call->op = reader.u32();
  call->origin = reader.u32();
  call->inputs = append_list(reader, kMaxOperands, &entry->operands, [&] { return reader.u32(); });
  call->outputs = append_list(reader, kMaxOperands, &entry->operands, [&] { return reader.u32(); });
  call->ints = append_list(reader, kMaxAttributes, &entry->ints, [&] { return reader.i64(); });
  call->ints = ints->shared(call->ints, &entry->ints);
  call->floats = append_list(reader, kMaxAttributes, &entry->floats, [&] { return reader.f64(); });
  call->floats = floats->shared(call->floats, &entry->floats);
  call->workspace_offset = reader.u64();
  call->workspace_bytes = reader.u64();
  return reader.failed() ? truncated("call", index) : PK_OK;
}

// Makes room for the operands of all calls, so that the array does not grow step by step and leave holes
// behind. Takes a reader of its own; what is wrong with the file is for `read_call` to say.
void reserve_operands(ByteReader reader, EntryRecord* entry) {
  size_t operands = 0;
  for (size_t i = 0; i < entry->calls.size() && !reader.failed(); ++i) {
    reader.u64();  // op and origin
    operands += reader.skip_list(kMaxOperands, sizeof(uint32_t));
    operands += reader.skip_list(kMaxOperands, sizeof(uint32_t));
    reader.skip_list(kMaxAttributes, sizeof(int64_t));
    reader.skip_list(kMaxAttributes, sizeof(double));
    reader.u64();  // workspace
    reader.u64();
  }
  entry->operands.reserve(operands);
}

void read_arguments(ByteReader& reader, std::vector<Argument>* arguments) {
  read_list(reader, kMaxArguments, 8, arguments, [&] {
    std::string name = reader.text(kMaxText);
    const uint32_t tensor = reader.u32();
    return Argument{std::move(name), tensor};
  });
}

Status read_entry(ByteReader& reader, size_t index, EntryRecord* entry) {
  entry->name = reader.text(kMaxText);
  read_arguments(reader, &entry->inputs);
  read_arguments(reader, &entry->outputs);
  const uint32_t calls = reader.count(kMaxCalls, 40);
  if (reader.failed()) return truncated("entry", index);
  entry->calls.resize(calls);
  reserve_operands(reader, entry);
  KnownLists ints, floats;
  for (size_t i = 0; i < calls; ++i) POCKC_TRY(read_call(reader, i, entry, &ints, &floats));
  return PK_OK;
}

Status read_head(ByteReader& reader, Program* program) {
  program->state_bytes = reader.u64();
  program->arena_bytes = reader.u64();
  program->max_threads = reader.u32();
  program->accumulation = reader.u32();
  if (reader.failed()) return fail(PK_BAD_FILE, "the program section is cut off");
  if (program->arena_bytes > kMaxBytes || program->state_bytes > program->arena_bytes) {
    return fail(PK_BAD_FILE, "the program section is corrupt: the arena's size is out of range");
  }
  if (program->max_threads < 1 || program->max_threads > 256 || program->accumulation < 1) {
    return fail(PK_BAD_FILE, "the program section is corrupt: thread or accumulation count out of range");
  }
  return PK_OK;
}

}  // namespace

Status read_program_section(Bytes section, Program* program) {
  ByteReader reader(section.data, section.size);
  POCKC_TRY(read_head(reader, program));
  program->tensors.resize(reader.count(kMaxTensors, 12));
  for (size_t i = 0; i < program->tensors.size(); ++i)
    POCKC_TRY(read_tensor(reader, i, &program->tensors[i]));
  program->states.resize(reader.count(kMaxStates, 20));
  for (size_t i = 0; i < program->states.size(); ++i) POCKC_TRY(read_state(reader, i, &program->states[i]));
  read_list(reader, kMaxStrings, 4, &program->strings, [&] { return reader.text(kMaxText); });
  program->entries.resize(reader.count(kMaxEntries, 16));
  for (size_t i = 0; i < program->entries.size(); ++i) POCKC_TRY(read_entry(reader, i, &program->entries[i]));
  if (reader.failed()) return fail(PK_BAD_FILE, "the program section is cut off or a count is out of range");
  if (reader.remaining() != 0) return fail(PK_BAD_FILE, "the program section has bytes after its end");
  return PK_OK;
}

}  // namespace pockc
