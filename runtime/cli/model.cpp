// What the verbs share.
#include <signal.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "commands.h"
#include "error.h"

namespace pockc::cli {
namespace {

volatile sig_atomic_t received_signal = 0;

}  // namespace

int stop_signal() { return received_signal; }

void catch_stop_signals() {
  struct sigaction action = {};
  action.sa_handler = [](int signal) { received_signal = signal; };
  action.sa_flags = SA_RESTART;  // a save that is under way goes on
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

std::string format(const char* text, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(buffer, sizeof(buffer), text, arguments);
  va_end(arguments);
  return buffer;
}

std::string format_bytes(uint64_t bytes) {
  if (bytes < 1024) return std::to_string(bytes) + " B";
  if (bytes < (1u << 20)) return format("%.1f KiB", static_cast<double>(bytes) / 1024);
  return format("%.1f MiB", static_cast<double>(bytes) / (1 << 20));
}

int report_failure() {
  std::fprintf(stderr, "pock-run: %s\n", pk_last_error());
  return 1;
}

Status check_writable(const std::string& path) {
  if (path.empty()) return PK_OK;
  AtomicWriter probe(posix_file_system());  // its temporary file goes away with it
  return probe.open(path.c_str());
}

Status write_report(const std::string& path, const std::string& json) {
  AtomicWriter writer(posix_file_system());
  POCKC_TRY(writer.open(path.c_str()));
  POCKC_TRY(writer.write(json.data(), json.size()));
  return writer.commit();
}

Status Model::open(const Options& options) {
  resident_before = resident_bytes();
  loading.start();
  POCKC_TRY(load_program(options.model.c_str(), &program));
  threads = static_cast<int>(options.threads);
  if (options.threads > static_cast<int64_t>(program.max_threads)) {
    threads = static_cast<int>(program.max_threads);
    std::fprintf(stderr, "pock-run: the program was planned for %d threads: using %d\n", threads, threads);
  }
  SessionSettings settings;
  settings.threads = threads;
  POCKC_TRY(session.create(program, settings));
  session.set_file_system(*options.file_system);
  loading.stop();
  resident_after = resident_bytes();
  return PK_OK;
}

const EntryRecord* Model::entry(const char* name) const {
  const EntryRecord* found = program.find_entry(name);
  if (found != nullptr) return found;
  std::string list;
  for (const EntryRecord& entry : program.entries) list += (list.empty() ? "" : ", ") + entry.name;
  fail(PK_NOT_FOUND, "the program has no entry `%s`: it has %s", name, list.c_str());
  return nullptr;
}

bool Model::read_loss_scale(float* scale, int64_t* skipped) const {
  constexpr const char* kSkippedState = "pockc.skipped_steps";
  if (program.find_state(kScaleState) == nullptr || program.find_state(kSkippedState) == nullptr)
    return false;
  pk_tensor scale_tensor{scale, PK_F32, 0, {}}, skipped_tensor{skipped, PK_I64, 0, {}};
  return session.read_state(kScaleState, &scale_tensor) == PK_OK &&
         session.read_state(kSkippedState, &skipped_tensor) == PK_OK;
}

void Model::describe(JsonObject* report) const {
  const pk_memory memory = session.memory();
  report->add("threads", int64_t{threads})
      .add("instruction_set", best_isa())
      .add("batch_accumulation", int64_t{program.accumulation})
      .add("arena_bytes", static_cast<int64_t>(memory.arena_bytes))
      .add("state_bytes", static_cast<int64_t>(memory.state_bytes))
      .add("mapped_bytes", static_cast<int64_t>(memory.mapped_bytes))
      .add("used_peak_bytes", static_cast<int64_t>(memory.used_peak_bytes))
      .add("rss_before_load_bytes", resident_before)
      .add("rss_after_load_bytes", resident_after)
      .add("rss_peak_bytes", peak_resident_bytes());
}

Output::Output(const Program& program, const Argument& argument) : name(argument.name.c_str()) {
  const TensorRecord& record = program.tensors[argument.tensor];
  buffer.resize(record.bytes / 8 + 1);
  tensor = pk_tensor{buffer.data(), static_cast<pk_dtype>(record.type.dtype), record.type.rank, {}};
  std::memcpy(tensor.dims, record.type.dims, sizeof(tensor.dims));
}

int find_loss(const Program& program, const EntryRecord& entry) {
  for (size_t i = 0; i < entry.outputs.size(); ++i) {
    const Tensor& type = program.tensors[entry.outputs[i].tensor].type;
    if (entry.outputs[i].name == "loss" && type.dtype == DType::kF32 && type.elements() == 1)
      return static_cast<int>(i);
  }
  return -1;
}

Progress::Progress(std::string title, int64_t total, bool wanted)
    : title_(std::move(title)),
      total_(total),
      active_(wanted && isatty(STDERR_FILENO) != 0),
      start_(wall_seconds()) {}

Progress::~Progress() {
  if (active_) std::fprintf(stderr, "\r\033[K");
}

void Progress::show(int64_t done, const std::string& note) {
  constexpr int kWidth = 24;
  const double now = wall_seconds();
  if (first_done_ < 0) first_done_ = done - 1;
  if (!active_ || now - last_shown_ < 0.1) return;
  last_shown_ = now;
  const double left =
      (now - start_) / static_cast<double>(done - first_done_) * static_cast<double>(total_ - done);
  char bar[kWidth + 1] = {};
  for (int i = 0; i < kWidth; ++i) bar[i] = i * total_ < done * kWidth ? '#' : '.';
  std::fprintf(stderr, "\r\033[K%s [%s] %lld/%lld  %s  %d:%02d left", title_.c_str(), bar,
               static_cast<long long>(done), static_cast<long long>(total_), note.c_str(),
               static_cast<int>(left) / 60, static_cast<int>(left) % 60);
  std::fflush(stderr);
}

}  // namespace pockc::cli
