// bench: steps of one entry on made-up samples, timed one by one.
#include <cstdio>
#include <cstring>

#include "board.h"
#include "commands.h"
#include "error.h"
#include "profile.h"

namespace pockc::cli {
namespace {

constexpr int64_t kWarmUpSteps = 3;

// In place, before every run. Uniform values in [-1, 1) for floats; zeros, which are valid ids and labels,
// for everything else.
Status fill_inputs(Session* session, const EntryRecord& entry, std::vector<pk_tensor>* tensors) {
  uint64_t state = 1;
  for (size_t i = 0; i < entry.inputs.size(); ++i) {
    const TensorRecord& record = session->program().tensors[entry.inputs[i].tensor];
    pk_tensor& tensor = (*tensors)[i];
    POCKC_TRY(session->input(entry.name.c_str(), entry.inputs[i].name.c_str(), &tensor));
    std::memset(tensor.data, 0, record.bytes);
    if (tensor.dtype != PK_F32) continue;
    float* values = static_cast<float*>(tensor.data);
    for (int64_t k = 0; k < record.type.elements(); ++k) {
      values[k] = static_cast<float>(splitmix64(&state) >> 40) * 0x1p-23f - 1.0f;
    }
  }
  return PK_OK;
}

// Reads one byte of every page of the mapped weights. A step may leave some alone: rows of embedding tables
// that no id asks for.
void read_weights(const Program& program) {
  constexpr uint64_t kPage = 4096;
  volatile uint8_t sink = 0;
  for (const TensorRecord& tensor : program.tensors) {
    if (tensor.storage != Storage::kData) continue;
    for (uint64_t at = tensor.offset; at < tensor.end(); at += kPage) sink = program.data.data[at];
    if (tensor.bytes > 0) sink = program.data.data[tensor.end() - 1];
  }
  static_cast<void>(sink);
}

int64_t batch_size(const Program& program, const EntryRecord& entry) {
  for (const Argument& input : entry.inputs) {
    const Tensor& type = program.tensors[input.tensor].type;
    if (type.rank > 0) return type.dims[0];
  }
  return 1;
}

// `first` gets the very first step, which touches every page of arena and weights for the first time.
Status time_steps(Model* model, const EntryRecord* entry, int64_t steps, StepTimer* first, StepTimer* timer,
                  Profile* profile) {
  std::vector<const char*> names;
  for (const Argument& argument : entry->inputs) names.push_back(argument.name.c_str());
  std::vector<pk_tensor> tensors(names.size());
  for (int64_t i = 0; i < kWarmUpSteps + steps; ++i) {
    if (i == 1) *first = *timer;
    if (i == kWarmUpSteps) {
      timer->clear();
      profile->clear();
    }
    POCKC_TRY(fill_inputs(&model->session, *entry, &tensors));
    timer->start();
    POCKC_TRY(model->session.run(entry->name.c_str(), names.data(), tensors.data(),
                                 static_cast<int32_t>(tensors.size()), nullptr, nullptr, 0));
    timer->stop();
  }
  return PK_OK;
}

}  // namespace

int bench(const Options& options) {
  Model model;
  StepTimer first, timer;
  if (model.open(options) != PK_OK) return report_failure();
  if (options.read_weights) read_weights(model.program);
  const EntryRecord* entry = model.entry(options.entry.c_str());
  if (entry == nullptr) return report_failure();
  Profile profile(*entry);
  if (options.profile) model.session.set_observer(&profile);
  if (time_steps(&model, entry, options.steps, &first, &timer, &profile) != PK_OK) return report_failure();
  const Board board = read_board("");  // while the clock is still that of the steps
  const pk_memory memory = model.session.memory();
  const double samples_per_second =
      1e3 * static_cast<double>(batch_size(model.program, *entry)) / timer.wall(0.5);
  const int64_t resident = peak_resident_bytes() - model.resident_before;
  std::printf("wall  %.3f ms/step median, %.3f 95th percentile\n", timer.wall(0.5), timer.wall(0.95));
  std::printf("CPU   %.3f ms/step median, %.3f 95th percentile\n", timer.cpu(0.5), timer.cpu(0.95));
  std::printf("start %.3f ms CPU to load, %.3f for the first step\n", model.loading.mean_cpu(),
              first.mean_cpu());
  std::printf("speed %.2f samples/s, batch %lld, %d threads, %s\n", samples_per_second,
              static_cast<long long>(batch_size(model.program, *entry)), model.threads, best_isa());
  std::printf("arena %s, used %s, mapped weights %s\n", format_bytes(memory.arena_bytes).c_str(),
              format_bytes(memory.used_peak_bytes).c_str(), format_bytes(memory.mapped_bytes).c_str());
  std::printf("RSS   %s before load, %s after, %s at the peak\n", format_bytes(model.resident_before).c_str(),
              format_bytes(model.resident_after).c_str(), format_bytes(peak_resident_bytes()).c_str());
  std::printf("peak  %s planned (arena and mapped weights), %s more resident than before the load\n",
              format_bytes(memory.arena_bytes + memory.mapped_bytes).c_str(),
              format_bytes(static_cast<uint64_t>(resident > 0 ? resident : 0)).c_str());
  std::printf("%s", describe(board).c_str());
  const Limits limits = options.profile ? measure_limits() : Limits();
  if (options.profile) profile.print(model.program, limits);
  if (options.json.empty()) return 0;
  JsonObject report;
  report.add("steps", static_cast<int64_t>(timer.steps())).add("ms_per_step", timer.mean_wall());
  report.add("ms_per_step_median", timer.wall(0.5)).add("ms_per_step_p95", timer.wall(0.95));
  report.add("cpu_ms_per_step", timer.mean_cpu()).add("cpu_ms_per_step_median", timer.cpu(0.5));
  report.add("cpu_ms_per_step_p95", timer.cpu(0.95));
  report.add("load_ms", model.loading.mean_wall()).add("cpu_load_ms", model.loading.mean_cpu());
  report.add("first_step_ms", first.mean_wall()).add("cpu_first_step_ms", first.mean_cpu());
  if (options.profile) {
    report.add_json("profile", profile.json(model.program));
    report.add("limit_gflops", limits.gflops).add("limit_gigabytes_per_second", limits.gigabytes);
  }
  report.add("samples_per_second", samples_per_second).add("batch_size", batch_size(model.program, *entry));
  report.add("planned_peak_bytes", static_cast<int64_t>(memory.arena_bytes + memory.mapped_bytes));
  report.add("rss_added_peak_bytes", resident);
  model.describe(&report);
  add_board(board, &report);
  return write_report(options.json, report.text() + "\n") == PK_OK ? 0 : report_failure();
}

}  // namespace pockc::cli
