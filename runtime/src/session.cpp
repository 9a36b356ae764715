// Creation of a session: kernels are chosen, then memory is allocated, then nothing more.
#include "session.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "error.h"

namespace pockc {
namespace {

constexpr uint64_t kLargePage = 2 << 20;

}  // namespace

Session::~Session() {
  delete pool_;
  std::free(arena_);
}

Status Session::create(const Program& program, const SessionSettings& settings) {
  program_ = &program;
  if (settings.threads < 1 || static_cast<uint32_t>(settings.threads) > program.max_threads) {
    return fail(PK_INVALID_ARGUMENT, "%d threads asked for: this program was planned for 1 to %u",
                settings.threads, program.max_threads);
  }
  pool_ = new (std::nothrow) ThreadPool(settings.threads);
  if (pool_ == nullptr) return fail(PK_OUT_OF_MEMORY, "no memory for the thread pool");
  tensors_.reserve(program.tensors.size());
  for (const TensorRecord& tensor : program.tensors) tensors_.push_back(tensor.type);
  entries_.resize(program.entries.size());
  for (size_t i = 0; i < entries_.size(); ++i) {
    POCKC_TRY(bind_entry(program.entries[i], settings, &entries_[i]));
  }
  POCKC_TRY(allocate());
  set_initial_states();
  program.file.drop_pages();  // the initial contents of trained states are not needed again
  mapped_bytes_ = count_mapped_bytes();
  return PK_OK;
}

Status Session::bind_entry(const EntryRecord& record, const SessionSettings& settings, BoundEntry* entry) {
  entry->record = &record;
  entry->operands.reserve(record.operands.size());
  for (const uint32_t index : record.operands) entry->operands.push_back(&tensors_[index]);
  entry->calls.resize(record.calls.size());
  for (size_t i = 0; i < record.calls.size(); ++i) {
    const CallRecord& call = record.calls[i];
    entry->calls[i].end = highest_address(record, call);
    POCKC_TRY(bind_call(settings, call, call_of(*entry, call), &entry->calls[i]));
  }
  return PK_OK;
}

uint64_t Session::highest_address(const EntryRecord& entry, const CallRecord& call) const {
  uint64_t end = call.workspace_bytes == 0 ? 0 : call.workspace_offset + call.workspace_bytes;
  for (const Span<uint32_t>& list : {entry.inputs_of(call), entry.outputs_of(call)}) {
    for (const uint32_t index : list) {
      const TensorRecord& tensor = program_->tensors[index];
      if (tensor.storage == Storage::kArena) end = std::max(end, tensor.end());
    }
  }
  return end;
}

Call Session::call_of(const BoundEntry& entry, const CallRecord& record) const {
  Call call;
  call.inputs = Operands(entry.operands.data() + record.inputs.first);
  call.input_count = static_cast<int32_t>(record.inputs.count);
  call.outputs = Operands(entry.operands.data() + record.outputs.first);
  call.output_count = static_cast<int32_t>(record.outputs.count);
  call.ints = entry.record->ints.data() + record.ints.first;
  call.int_count = static_cast<int32_t>(record.ints.count);
  call.floats = entry.record->floats.data() + record.floats.first;
  call.float_count = static_cast<int32_t>(record.floats.count);
  call.workspace_bytes = record.workspace_bytes;
  if (record.workspace_bytes > 0 && arena_ != nullptr) call.workspace = arena_ + record.workspace_offset;
  call.pool = pool_;
  return call;
}

Status Session::bind_call(const SessionSettings& settings, const CallRecord& record, const Call& call,
                          BoundCall* bound) const {
  const char* op = text(record.op);
  const char* origin = text(record.origin);
  const KernelEntry* reference = find_reference(op);
  if (reference == nullptr && is_specialised()) {
    return fail(PK_UNSUPPORTED,
                "op `%s` at %s is not in this pock-run, which has the kernels of another program alone: use "
                "the one that was built with this program",
                op, origin);
  }
  if (reference == nullptr) {
    return fail(PK_UNSUPPORTED,
                "op `%s` at %s is not in this runtime (%s): use the runtime that came with the compiler", op,
                origin, pk_version());
  }
  clear_error();
  bool has_reference = true;
  const Status status = check_call(*reference, call, &has_reference);
  if (status != PK_OK) {
    const std::string reason =
        last_error()[0] == '\0' ? "its operands or attributes are wrong" : last_error();
    return fail(status, "op `%s` at %s cannot run: %s", op, origin, reason.c_str());
  }
  bound->run = reference->run;
  if (settings.reference_only && has_reference) return PK_OK;
  if (settings.isa == nullptr && !settings.reference_only) {
    const KernelEntry* half = find_half_arithmetic(op, program_->half_arithmetic);
    if (half != nullptr && half->accepts(call)) {
      bound->run = half->run;
      return PK_OK;
    }
  }
  const KernelEntry* simd = find_simd(op, settings.isa);
  if (simd != nullptr && simd->accepts(call)) {
    bound->run = simd->run;
  } else if (!has_reference) {
    return fail(PK_BAD_FILE, "op `%s` at %s cannot run: no kernel takes its 16-bit operands", op, origin);
  }
  return PK_OK;
}

Status Session::allocate() {
  const uint64_t bytes = program_->arena_bytes;
  // Large pages where the system has them: a matrix product walks along more rows than the processor
  // remembers pages. Only pages that lie in the arena as a whole become large, so that it takes no more
  // memory.
  const bool large = bytes >= 2 * kLargePage;
  void* memory = nullptr;
  if (bytes > SIZE_MAX ||
      posix_memalign(&memory, large ? kLargePage : kAlignment, bytes == 0 ? 1 : bytes) != 0) {
    return fail(PK_OUT_OF_MEMORY, "cannot allocate the arena of %llu bytes (%.1f MiB)",
                static_cast<unsigned long long>(bytes), static_cast<double>(bytes) / (1 << 20));
  }
#ifdef MADV_HUGEPAGE
  if (large) madvise(memory, bytes / kLargePage * kLargePage, MADV_HUGEPAGE);
#endif
  arena_ = static_cast<unsigned char*>(memory);
  for (size_t i = 0; i < tensors_.size(); ++i) tensors_[i].data = address(program_->tensors[i]);
  return PK_OK;
}

void* Session::address(const TensorRecord& tensor) const {
  if (tensor.storage == Storage::kArena) return arena_ + tensor.offset;
  return const_cast<uint8_t*>(program_->data.data) + tensor.offset;  // never an output: checked at load
}

void Session::set_initial_states() {
  constexpr uint64_t kManyBytes = uint64_t{1} << 18;
  uint64_t copied = 0;  // since pages were given back: else all states would be in memory twice
  for (const StateRecord& state : program_->states) {
    if (!state.is_mutable) continue;
    const TensorRecord& tensor = program_->tensors[state.tensor];
    std::memcpy(arena_ + tensor.offset, program_->data.data + state.initial, tensor.bytes);
    copied += tensor.bytes;
    if (copied < kManyBytes) continue;
    program_->file.drop_pages();
    copied = 0;
  }
}

void Session::reset() {
  set_initial_states();
  micro_step_ = 0;
  cursor_.clear();
}

bool Session::is_finite(const StateRecord& state) const {
  const Tensor& tensor = tensors_[state.tensor];
  if (tensor.dtype != DType::kF32) return true;
  const float* values = tensor.as<float>();
  bool finite = true;  // no early exit: the loop is then one of vectors
  for (int64_t i = 0; i < tensor.elements(); ++i) finite &= std::isfinite(values[i]);
  return finite;
}

// Bytes of DATA that tensors of the program cover: frozen weights and constants, each byte once.
uint64_t Session::count_mapped_bytes() const {
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (const TensorRecord& tensor : program_->tensors) {
    if (tensor.storage == Storage::kData) ranges.emplace_back(tensor.offset, tensor.end());
  }
  std::sort(ranges.begin(), ranges.end());
  uint64_t total = 0, covered = 0;
  for (const auto& range : ranges) {
    if (range.second <= covered) continue;
    total += range.second - (range.first > covered ? range.first : covered);
    covered = range.second;
  }
  return total;
}

pk_memory Session::memory() const {
  return pk_memory{program_->arena_bytes, program_->state_bytes, mapped_bytes_, used_peak_};
}

}  // namespace pockc
