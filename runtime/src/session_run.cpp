// Running entries and moving tensors in and out of a session.
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "error.h"
#include "permuted_view.h"
#include "session.h"

namespace pockc {
namespace {

// Entries that update, and what runs in their place until gradients are complete.
constexpr struct {
  const char* step;
  const char* micro;
} kMicroSteps[] = {{"train_step", "accumulate"}, {"train_step_encoded", "accumulate_encoded"}};

bool is_step(const char* name) {
  for (const auto& pair : kMicroSteps) {
    if (std::strcmp(name, pair.step) == 0) return true;
  }
  return false;
}

const Argument* find_argument(const std::vector<Argument>& arguments, const char* name) {
  for (const Argument& argument : arguments) {
    if (argument.name == name) return &argument;
  }
  return nullptr;
}

bool same_shape(const Tensor& wanted, const pk_tensor& given) {
  if (wanted.rank != given.rank) return false;
  for (int axis = 0; axis < wanted.rank; ++axis) {
    if (wanted.dims[axis] != given.dims[axis]) return false;
  }
  return true;
}

bool batch_differs_only(const Tensor& wanted, const pk_tensor& given) {
  if (wanted.rank != given.rank || wanted.rank == 0) return false;
  for (int axis = 1; axis < wanted.rank; ++axis) {
    if (wanted.dims[axis] != given.dims[axis]) return false;
  }
  return true;
}

// `role` is "input", "output" or "state".
Status check_tensor(const char* role, const char* name, const Tensor& wanted, const pk_tensor& given) {
  if (given.data == nullptr)
    return fail(PK_INVALID_ARGUMENT, "%s `%s` has no data: its pointer is null", role, name);
  if (given.rank < 0 || given.rank > PK_MAX_RANK) {
    return fail(PK_INVALID_ARGUMENT, "%s `%s` has rank %d: 0 to %d are possible", role, name, given.rank,
                PK_MAX_RANK);
  }
  if (given.dtype < PK_F32 || given.dtype > PK_BOOL) {
    return fail(PK_INVALID_ARGUMENT, "%s `%s` has the unknown dtype %d", role, name,
                static_cast<int>(given.dtype));
  }
  const DType dtype = static_cast<DType>(given.dtype);
  if (dtype != wanted.dtype) {
    return fail(PK_TYPE_MISMATCH, "%s `%s` has dtype %s, the program wants %s", role, name, dtype_name(dtype),
                dtype_name(wanted.dtype));
  }
  if (same_shape(wanted, given)) return PK_OK;
  const ShapeText given_shape(given.rank, given.dims);
  const ShapeText wanted_shape(wanted.rank, wanted.dims);
  if (!batch_differs_only(wanted, given)) {
    return fail(PK_TYPE_MISMATCH, "%s `%s` has shape %s, the program wants %s", role, name, given_shape.text,
                wanted_shape.text);
  }
  return fail(PK_TYPE_MISMATCH,
              "%s `%s` has shape %s, the program wants %s; rebuild with --batch-size %" PRId64
              " or pad the batch",
              role, name, given_shape.text, wanted_shape.text, given.dims[0]);
}

}  // namespace

ShapeText::ShapeText(int32_t rank, const int64_t* dims) {
  size_t length = 0;
  text[length++] = '[';
  for (int32_t axis = 0; axis < rank && axis < PK_MAX_RANK; ++axis) {
    length += static_cast<size_t>(std::snprintf(text + length, sizeof(text) - length,
                                                axis == 0 ? "%" PRId64 : ",%" PRId64, dims[axis]));
  }
  text[length++] = ']';
  text[length] = '\0';
}

// With gradient accumulation, a call of "train_step" is a micro-step until the last one of the group; so is
// one of "train_step_encoded", which starts behind the frozen prefix.
Status Session::select_entry(const char* name, const BoundEntry** entry) const {
  const bool accumulates = program_->accumulation > 1;
  const char* wanted = name;
  for (const auto& pair : kMicroSteps) {
    if (accumulates && std::strcmp(name, pair.micro) == 0)
      return fail(PK_INVALID_ARGUMENT, "run `%s`: it takes care of `%s`", pair.step, pair.micro);
    if (accumulates && std::strcmp(name, pair.step) == 0 && micro_step_ + 1 < program_->accumulation)
      wanted = pair.micro;
  }
  for (const BoundEntry& candidate : entries_) {
    if (candidate.record->name != wanted) continue;
    *entry = &candidate;
    return PK_OK;
  }
  return fail(PK_NOT_FOUND, "the program has no entry `%s`", wanted);
}

Status Session::input(const char* entry_name, const char* name, pk_tensor* out) {
  const BoundEntry* entry = nullptr;
  POCKC_TRY(select_entry(entry_name, &entry));
  const Argument* argument = find_argument(entry->record->inputs, name);
  if (argument == nullptr) return fail(PK_NOT_FOUND, "entry `%s` has no input `%s`", entry_name, name);
  const TensorRecord& record = program_->tensors[argument->tensor];
  *out = pk_tensor{arena_ + record.offset, static_cast<pk_dtype>(record.type.dtype), record.type.rank, {}};
  std::memcpy(out->dims, record.type.dims, sizeof(out->dims));
  return PK_OK;
}

bool Session::in_arena(const void* data) const {
  const uintptr_t start = reinterpret_cast<uintptr_t>(arena_), at = reinterpret_cast<uintptr_t>(data);
  return at >= start && at - start < program_->arena_bytes;
}

// A pointer into the arena is right where the input lies, and nowhere else: what is there would be
// overwritten while other inputs are copied in.
Status Session::check_input(const EntryRecord& entry, const char* name, const pk_tensor& given) const {
  const Argument* argument = find_argument(entry.inputs, name);
  if (argument == nullptr)
    return fail(PK_NOT_FOUND, "entry `%s` has no input `%s`", entry.name.c_str(), name);
  const TensorRecord& target = program_->tensors[argument->tensor];
  POCKC_TRY(check_tensor("input", name, target.type, given));
  if (!in_arena(given.data) || given.data == arena_ + target.offset) return PK_OK;
  return fail(PK_INVALID_ARGUMENT,
              "input `%s` lies inside the arena, but not where this run of entry `%s` reads it: ask "
              "pk_session_input before each run",
              name, entry.name.c_str());
}

// All arguments are checked before the first is copied.
Status Session::copy_inputs(const EntryRecord& entry, const char* const* names, const pk_tensor* tensors,
                            int32_t count) {
  for (int32_t i = 0; i < count; ++i) {
    POCKC_TRY(check_input(entry, names[i], tensors[i]));
  }
  for (const Argument& argument : entry.inputs) {
    int given = 0;
    for (int32_t i = 0; i < count; ++i) given += argument.name == names[i] ? 1 : 0;
    if (given == 1) continue;
    return fail(PK_INVALID_ARGUMENT, "input `%s` of entry `%s` is %s", argument.name.c_str(),
                entry.name.c_str(), given == 0 ? "missing" : "given twice");
  }
  for (int32_t i = 0; i < count; ++i) {
    const TensorRecord& target = program_->tensors[find_argument(entry.inputs, names[i])->tensor];
    touch(target.end());
    if (tensors[i].data == arena_ + target.offset) continue;
    std::memcpy(arena_ + target.offset, tensors[i].data, target.bytes);
  }
  return PK_OK;
}

Status Session::check_outputs(const EntryRecord& entry, const char* const* names, const pk_tensor* tensors,
                              int32_t count) const {
  for (int32_t i = 0; i < count; ++i) {
    const Argument* argument = find_argument(entry.outputs, names[i]);
    if (argument == nullptr) {
      return fail(PK_NOT_FOUND, "entry `%s` has no output `%s`", entry.name.c_str(), names[i]);
    }
    POCKC_TRY(check_tensor("output", names[i], program_->tensors[argument->tensor].type, tensors[i]));
  }
  return PK_OK;
}

Status Session::run_observed(const BoundEntry& entry, size_t index) const {
  const Call call = call_of(entry, entry.record->calls[index]);
  observer_->before(*entry.record, index);
  const Status status = entry.calls[index].run(call);
  observer_->after(*entry.record, index);
  return status;
}

Status Session::run_calls(const BoundEntry& entry) {
  for (size_t i = 0; i < entry.calls.size(); ++i) {
    const BoundCall& bound = entry.calls[i];
    const CallRecord& record = entry.record->calls[i];
    touch(bound.end);
    const Status status = observer_ == nullptr ? bound.run(call_of(entry, record)) : run_observed(entry, i);
    if (status == PK_OK) continue;
    if (status == kEntryEnds) return PK_OK;
    char reason[512];
    std::snprintf(reason, sizeof(reason), "%s",
                  last_error()[0] == '\0' ? pk_status_string(status) : last_error());
    return fail(status, "op `%s` at %s: %s", text(record.op), text(record.origin), reason);
  }
  return PK_OK;
}

Status Session::run(const char* name, const char* const* input_names, const pk_tensor* inputs,
                    int32_t input_count, const char* const* output_names, const pk_tensor* outputs,
                    int32_t output_count) {
  const BoundEntry* entry = nullptr;
  POCKC_TRY(select_entry(name, &entry));
  POCKC_TRY(check_outputs(*entry->record, output_names, outputs, output_count));
  POCKC_TRY(copy_inputs(*entry->record, input_names, inputs, input_count));
  clear_error();
  POCKC_TRY(run_calls(*entry));
  if (program_->accumulation > 1 && is_step(name)) {
    micro_step_ = (micro_step_ + 1) % program_->accumulation;
  }
  for (int32_t i = 0; i < output_count; ++i) {
    const TensorRecord& source =
        program_->tensors[find_argument(entry->record->outputs, output_names[i])->tensor];
    std::memcpy(outputs[i].data, arena_ + source.offset, source.bytes);
    touch(source.end());
  }
  return PK_OK;
}

Status Session::read_state(const char* name, pk_tensor* out) const {
  const StateRecord* state = program_->find_state(name);
  if (state == nullptr) return fail(PK_NOT_FOUND, "the program has no state `%s`", name);
  const Tensor& stored = tensors_[state->tensor];
  POCKC_TRY(check_tensor("state", name, state->original_type(stored), *out));
  const PermutedView view(*state, stored);
  view.gather(0, view.elements(), out->data);
  return PK_OK;
}

Status Session::write_state(const char* name, const pk_tensor& tensor) {
  const StateRecord* state = program_->find_state(name);
  if (state == nullptr) return fail(PK_NOT_FOUND, "the program has no state `%s`", name);
  if (!state->is_mutable) {
    return fail(PK_INVALID_ARGUMENT, "state `%s` is frozen in this program and cannot be written", name);
  }
  const Tensor& stored = tensors_[state->tensor];
  POCKC_TRY(check_tensor("state", name, state->original_type(stored), tensor));
  const PermutedView view(*state, stored);
  view.scatter(0, view.elements(), tensor.data);
  return PK_OK;
}

}  // namespace pockc
