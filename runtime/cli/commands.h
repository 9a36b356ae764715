// The verbs, and what they share: a loaded model, evaluation, messages.
#ifndef POCKC_CLI_COMMANDS_H_
#define POCKC_CLI_COMMANDS_H_

#include <string>
#include <vector>

#include "args.h"
#include "dataset.h"
#include "measure.h"
#include "session.h"

namespace pockc::cli {

constexpr const char* kScaleState = "pockc.loss_scale";  // there where the scale is dynamic

// A program with one session, and what loading did to the memory of the process and took.
struct Model {
  Program program;
  Session session;
  int threads = 1;
  int64_t resident_before = 0;
  int64_t resident_after = 0;
  StepTimer loading;  // of one step: until the session is ready

  Status open(const Options& options);
  // The entry, or null with an error that lists those that exist.
  const EntryRecord* entry(const char* name) const;
  // The scale of the loss, and how many steps were skipped so far because a gradient was not finite; false
  // where the scale is a constant of the program.
  bool read_loss_scale(float* scale, int64_t* skipped) const;
  // Adds memory figures, threads and instruction set to a report.
  void describe(JsonObject* report) const;
};

// One of an entry's outputs with room for its value.
struct Output {
  const char* name = nullptr;
  pk_tensor tensor{};
  std::vector<uint64_t> buffer;

  Output(const Program& program, const Argument& argument);
  const float* floats() const { return static_cast<const float*>(tensor.data); }
  const int64_t* integers() const { return static_cast<const int64_t*>(tensor.data); }
};

class PrefixCaches;

// Where the entry has an output `loss` of one float32, else -1.
int find_loss(const Program& program, const EntryRecord& entry);

// Loss and accuracy over samples. The last batch is filled up with samples from the start: they count for
// nothing, except that a data set smaller than one batch has its loss over the filled batch. Loss: mean over
// the full batches. Accuracy: over every sample, from the int64 outputs `correct` and `counted` [batch], else
// from the first float32 output [batch, classes] and the int64 input `labels` [batch] (labels below zero are
// not counted); NaN when the program has neither.
class Evaluator {
 public:
  // With `caches` from that of the name `name`, where the run has caches.
  Status open(const std::string& path, const Model& model, PrefixCaches* caches = nullptr,
              const char* name = nullptr);
  // Over some samples of a file that is open already.
  Status open_part(const Dataset& data, std::vector<int64_t> samples, const Model& model);
  Status run(Model* model, bool show_progress);

  double loss() const { return loss_; }
  double accuracy() const { return accuracy_; }
  int64_t samples() const { return part_.empty() ? data_.samples() : static_cast<int64_t>(part_.size()); }
  bool has_loss() const { return loss_output_ >= 0; }
  // `loss 0.2247  accuracy 0.812`, without what the program does not give.
  std::string describe() const;

 private:
  void find_outputs(const Model& model);
  void count_correct(int64_t real);
  void add_counts(int64_t real);

  const EntryRecord* entry_ = nullptr;
  Dataset data_;
  std::vector<int64_t> part_;  // the samples to use; empty: all
  std::vector<Output> outputs_;
  int loss_output_ = -1;
  int logits_output_ = -1;
  int correct_output_ = -1;
  int counted_output_ = -1;
  int64_t correct_ = 0;
  int64_t counted_ = 0;
  double loss_ = 0;
  double accuracy_ = 0;
};

// One line that is drawn over and over on a terminal, and nothing when stderr is none.
class Progress {
 public:
  Progress(std::string title, int64_t total, bool wanted);
  ~Progress();
  void show(int64_t done, const std::string& note);

 private:
  std::string title_;
  int64_t total_;
  bool active_;
  double start_;
  double last_shown_ = 0;
  int64_t first_done_ = -1;
};

// The number of the signal that asked the program to stop, or 0.
int stop_signal();
void catch_stop_signals();

// printf-style; used for lines such as reports, so up to 1 KiB.
std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string format_bytes(uint64_t bytes);
// Prints pk_last_error and returns the exit status 1.
int report_failure();
// Whether a file can be written in the directory of `path`: asked before hours of work, not after. An empty
// path is fine.
Status check_writable(const std::string& path);
Status write_report(const std::string& path, const std::string& json);

// Each returns the exit status of the process; the first runs the verb that the arguments name.
int dispatch(int argc, char** argv);
int train(const Options& options);
int evaluate(const Options& options);
int infer(const Options& options);
int bench(const Options& options);
int selftest(const Options& options);
int info(const Options& options);

}  // namespace pockc::cli

#endif  // POCKC_CLI_COMMANDS_H_
