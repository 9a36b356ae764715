// What the tables say of each other: after this, no index, offset or size of a program leads out of its
// bounds.
#include <algorithm>

#include "error.h"
#include "half.h"
#include "program.h"

namespace pockc {
namespace {

bool fits(uint64_t offset, uint64_t bytes, uint64_t size) { return offset <= size && bytes <= size - offset; }

bool overlap(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes) {
  return a_bytes > 0 && b_bytes > 0 && a < b + b_bytes && b < a + a_bytes;
}

Status check_tensors(const Program& program) {
  for (size_t i = 0; i < program.tensors.size(); ++i) {
    const TensorRecord& tensor = program.tensors[i];
    const bool in_arena = tensor.storage == Storage::kArena;
    const uint64_t size = in_arena ? program.arena_bytes : program.data.size;
    if (fits(tensor.offset, tensor.bytes, size)) continue;
    return fail(PK_BAD_FILE, "tensor %zu lies outside the %s", i, in_arena ? "arena" : "data section");
  }
  return PK_OK;
}

// Also where the kernels for such numbers were left out: pk_dtype has no name for them.
bool is_half_type(DType dtype) { return dtype == DType::kF16 || dtype == DType::kB16; }

Status check_state(const Program& program, const StateRecord& state) {
  const char* name = state.name.c_str();
  if (state.tensor >= program.tensors.size()) return fail(PK_BAD_FILE, "state `%s` has no tensor", name);
  const TensorRecord& tensor = program.tensors[state.tensor];
  if (is_half_type(tensor.type.dtype))
    return fail(PK_BAD_FILE, "state `%s` has 16 bits, which no caller can pass", name);
  if (state.permutation_rank != 0 && state.permutation_rank != tensor.type.rank) {
    return fail(PK_BAD_FILE, "the permutation of state `%s` is not of its tensor's rank", name);
  }
  if (!fits(state.initial, tensor.bytes, program.data.size)) {
    return fail(PK_BAD_FILE, "the initial value of state `%s` lies outside the data section", name);
  }
  const bool in_arena = tensor.storage == Storage::kArena;
  if (state.is_mutable != in_arena) {
    return fail(PK_BAD_FILE, "state `%s` is %s", name,
                in_arena ? "frozen but in the arena" : "mutable but not in the arena");
  }
  if (in_arena && !fits(tensor.offset, tensor.bytes, program.state_bytes)) {
    return fail(PK_BAD_FILE, "state `%s` lies outside the arena's part for states", name);
  }
  return PK_OK;
}

Status check_states(const Program& program) {
  std::vector<const std::string*> names;
  for (const StateRecord& state : program.states) {
    POCKC_TRY(check_state(program, state));
    names.push_back(&state.name);
  }
  std::sort(names.begin(), names.end(), [](const std::string* a, const std::string* b) { return *a < *b; });
  for (size_t i = 1; i < names.size(); ++i) {
    if (*names[i - 1] == *names[i])
      return fail(PK_BAD_FILE, "two states have the name `%s`", names[i]->c_str());
  }
  return PK_OK;
}

Status check_arguments(const Program& program, const EntryRecord& entry,
                       const std::vector<Argument>& arguments) {
  for (const Argument& argument : arguments) {
    if (argument.tensor >= program.tensors.size() ||
        program.tensors[argument.tensor].storage != Storage::kArena) {
      return fail(PK_BAD_FILE, "argument `%s` of entry `%s` is no tensor of the arena", argument.name.c_str(),
                  entry.name.c_str());
    }
    if (is_half_type(program.tensors[argument.tensor].type.dtype)) {
      return fail(PK_BAD_FILE, "argument `%s` of entry `%s` has 16 bits, which no caller can pass",
                  argument.name.c_str(), entry.name.c_str());
    }
  }
  return PK_OK;
}

// Ops that read and write element by element, or only move bytes, so that integers may be replaced in place.
// The slots of one byte per element are bytes of which each is a valid code.
// Others may use integers as indices, which must not change between the kernel's range check and their use.
bool replaces_integers(const std::string& op) {
  static const char* const kOps[] = {"add",         "sub",        "mul",         "maximum",   "minimum",
                                     "neg",         "abs",        "copy",        "reshape",   "insert",
                                     "logical_and", "logical_or", "logical_not", "momentum8", "adam8",
                                     "lion8",       "add_int8",   "lookup_int8"};
  for (const char* name : kOps) {
    if (op == name) return true;
  }
  return false;
}

// An output may be the very buffer of an input of the same dtype and size; nothing else may overlap.
bool may_share(const TensorRecord& input, const TensorRecord& output, const std::string& op) {
  const bool same = input.offset == output.offset && input.bytes == output.bytes;
  if (!same || input.type.dtype != output.type.dtype) return false;
  return output.type.dtype == DType::kF32 || is_half(output.type.dtype) || replaces_integers(op);
}

const char* find_overlap(const Program& program, const EntryRecord& entry, const CallRecord& call) {
  const std::string& op = program.strings[call.op];
  const Span<uint32_t> inputs = entry.inputs_of(call), outputs = entry.outputs_of(call);
  for (size_t i = 0; i < outputs.size(); ++i) {
    const TensorRecord& output = program.tensors[outputs[i]];
    if (output.storage != Storage::kArena) return "an output is not in the arena";
    if (overlap(output.offset, output.bytes, call.workspace_offset, call.workspace_bytes)) {
      return "an output overlaps the workspace";
    }
    for (size_t j = 0; j < i; ++j) {
      const TensorRecord& other = program.tensors[outputs[j]];
      if (overlap(output.offset, output.bytes, other.offset, other.bytes)) return "two outputs overlap";
    }
    for (uint32_t index : inputs) {
      const TensorRecord& input = program.tensors[index];
      if (input.storage != Storage::kArena) continue;
      if (!overlap(output.offset, output.bytes, input.offset, input.bytes)) continue;
      if (!may_share(input, output, op)) return "an output overlaps an input";
    }
  }
  for (uint32_t index : inputs) {
    const TensorRecord& input = program.tensors[index];
    if (input.storage != Storage::kArena) continue;
    if (overlap(input.offset, input.bytes, call.workspace_offset, call.workspace_bytes)) {
      return "an input overlaps the workspace";
    }
  }
  return nullptr;
}

bool all_below(Span<uint32_t> indices, size_t limit) {
  for (uint32_t index : indices) {
    if (index >= limit) return false;
  }
  return true;
}

Status check_call(const Program& program, const EntryRecord& entry, size_t index) {
  const CallRecord& call = entry.calls[index];
  const char* problem = nullptr;
  if (call.op >= program.strings.size() || call.origin >= program.strings.size()) {
    problem = "its op or origin is no string of the table";
  } else if (!all_below(entry.inputs_of(call), program.tensors.size()) ||
             !all_below(entry.outputs_of(call), program.tensors.size())) {
    problem = "an operand is no tensor of the table";
  } else if (call.workspace_offset % kAlignment != 0 ||
             !fits(call.workspace_offset, call.workspace_bytes, program.arena_bytes)) {
    problem = "its workspace lies outside the arena";
  } else {
    problem = find_overlap(program, entry, call);
  }
  if (problem == nullptr) return PK_OK;
  return fail(PK_BAD_FILE, "call %zu of entry `%s` is corrupt: %s", index, entry.name.c_str(), problem);
}

Status check_entry(const Program& program, const EntryRecord& entry) {
  if (program.find_entry(entry.name.c_str()) != &entry) {
    return fail(PK_BAD_FILE, "two entries have the name `%s`", entry.name.c_str());
  }
  POCKC_TRY(check_arguments(program, entry, entry.inputs));
  POCKC_TRY(check_arguments(program, entry, entry.outputs));
  for (size_t i = 0; i < entry.calls.size(); ++i) POCKC_TRY(check_call(program, entry, i));
  return PK_OK;
}

}  // namespace

Status check_program(const Program& program) {
  POCKC_TRY(check_tensors(program));
  POCKC_TRY(check_states(program));
  for (const EntryRecord& entry : program.entries) POCKC_TRY(check_entry(program, entry));
  const bool accumulates = program.accumulation > 1;
  if (accumulates && (!program.find_entry("accumulate") || !program.find_entry("train_step"))) {
    return fail(PK_BAD_FILE,
                "the program accumulates gradients but lacks the entry `accumulate` or `train_step`");
  }
  return PK_OK;
}

}  // namespace pockc
