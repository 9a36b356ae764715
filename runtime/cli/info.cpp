// info: what a program holds.
#include <cstdio>
#include <cstring>

#include "commands.h"
#include "error.h"
#include "json.h"

namespace pockc::cli {
namespace {

constexpr const char* kKinds[] = {"parameters", "buffers", "constants", "optimizer slots", "counters"};

std::string describe_arguments(const Program& program, const std::vector<Argument>& arguments) {
  std::string text;
  for (const Argument& argument : arguments) {
    const Tensor& type = program.tensors[argument.tensor].type;
    text += (text.empty() ? "" : ", ") + argument.name + " " + dtype_name(type.dtype) +
            ShapeText(type.rank, type.dims).text;
  }
  return text.empty() ? "nothing" : text;
}

void print_states(const Program& program, bool is_mutable) {
  for (int kind = 0; kind < 5; ++kind) {
    uint64_t count = 0, bytes = 0;
    for (const StateRecord& state : program.states) {
      if (state.is_mutable != is_mutable || static_cast<int>(state.kind) != kind) continue;
      ++count;
      bytes += program.tensors[state.tensor].bytes;
    }
    if (count == 0) continue;
    std::printf("  %-16s %6llu tensors  %s\n", kKinds[kind], static_cast<unsigned long long>(count),
                format_bytes(bytes).c_str());
  }
}

// The metadata is for people: a text member of it is printed where there is one.
void print_metadata(const Program& program) {
  Json metadata;
  if (!parse_json(reinterpret_cast<const char*>(program.metadata.data), program.metadata.size, &metadata))
    return;
  for (const char* key : {"model", "scheme", "optimizer", "loss", "schedule"}) {
    const std::string* value = metadata.find_text(key);
    if (value != nullptr) std::printf("%-14s %s\n", key, value->c_str());
  }
}

// The scale to begin with, of which the file has the bytes.
void print_loss_scale(const Program& program) {
  const StateRecord* state = program.find_state(kScaleState);
  if (state == nullptr || program.tensors[state->tensor].bytes != sizeof(float)) return;
  float scale = 0;
  std::memcpy(&scale, program.data.data + state->initial, sizeof(scale));
  std::printf("%-14s dynamic, %g to begin with\n", "loss scale", static_cast<double>(scale));
}

}  // namespace

int info(const Options& options) {
  Program program;
  if (load_program(options.model.c_str(), &program) != PK_OK) return report_failure();
  std::printf("%-14s %s\n", "program", options.model.c_str());
  print_metadata(program);
  std::printf("%-14s %s (%llu bytes)\n", "arena", format_bytes(program.arena_bytes).c_str(),
              static_cast<unsigned long long>(program.arena_bytes));
  std::printf("%-14s %s\n", "data", format_bytes(program.data.size).c_str());
  std::printf("%-14s %u at most\n", "threads", program.max_threads);
  std::printf("%-14s %u\n", "accumulation", program.accumulation);
  print_loss_scale(program);
  std::printf("%-14s %s\n", "golden vectors", program.golden.data == nullptr ? "no" : "yes");
  std::printf("%-14s %s (this machine)\n", "instructions", best_isa());
  std::printf("changing states\n");
  print_states(program, true);
  std::printf("frozen states\n");
  print_states(program, false);
  for (const EntryRecord& entry : program.entries) {
    std::printf("%s: %zu calls\n  inputs   %s\n  outputs  %s\n", entry.name.c_str(), entry.calls.size(),
                describe_arguments(program, entry.inputs).c_str(),
                describe_arguments(program, entry.outputs).c_str());
  }
  return 0;
}

}  // namespace pockc::cli
