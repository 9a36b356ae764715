// train: epochs over shuffled batches, checkpoints that carry the position in the data, and what a run needs
// that nobody watches: roll-back from NaN, early stopping, budgets, pauses.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "commands.h"
#include "cursor.h"
#include "error.h"
#include "prefix_cache.h"
#include "save_plan.h"

namespace pockc::cli {
namespace {

constexpr const char* kRateState = "pockc.learning_rate";
constexpr int kPaused = 3;  // exit status: stopped by a signal, saved, can be resumed

// Of the shuffle that chooses the samples held back for validation: no epoch has this number.
constexpr uint64_t kSplitEpoch = ~uint64_t{0};

class Trainer {
 public:
  explicit Trainer(const Options& options)
      : options_(options),
        plan_(options.save_every, options.save_seconds, 1e6 * options.max_megabytes_per_hour) {}

  Status open();
  Status run();
  Status report() const;
  int64_t steps_done() const { return steps_done_; }
  void print_end() const;

 private:
  Status open_validation();
  Status resume();
  Status check_cursor(const Cursor& saved) const;
  int64_t held_out() const;
  Status set_learning_rate();
  Status run_epoch();
  Status step(float* loss);
  Status finish_epoch();
  Status evaluate_epoch();
  void print_epoch(double loss) const;
  void record_epoch(double loss);
  void check_budgets();
  void check_patience();
  void stop(const char* reason);

  const StateRecord* find_bad_state() const;
  std::string describe_bad_loss(float loss) const;
  Status roll_back(const std::string& what);
  Status restore();

  Status save();
  Status save_due();
  Status write(const std::string& path);

  bool validates() const { return validation_.has_loss(); }

  const Options& options_;
  Model model_;
  const EntryRecord* entry_ = nullptr;
  PrefixCaches caches_;
  Dataset data_;
  Evaluator evaluator_;                      // of --eval: reported
  Evaluator validation_;                     // decides
  std::vector<Output> outputs_;              // the loss alone
  std::vector<const StateRecord*> watched_;  // mutable states that were finite at the start
  Cursor cursor_, start_;
  std::vector<int64_t> training_;  // the samples to train on; empty: all
  std::vector<int64_t> order_;
  int64_t batches_ = 0;
  int64_t steps_done_ = 0;  // of this run
  bool stop_ = false;
  const char* ended_ = "epochs";  // or "signal", "max-steps", "max-seconds", "patience"
  double started_ = 0;
  SavePlan plan_;
  bool has_checkpoint_ = false;  // the --save file is of this run
  bool unsaved_ = true;          // something is not in it
  int64_t failed_saves_ = 0;
  StepTimer timer_;
  std::vector<std::string> epochs_json_;
};

Status Trainer::open() {
  started_ = wall_seconds();
  plan_.start(started_);
  // Before the program is loaded: a missing checkpoint is the likelier mistake, and the cheaper to find.
  if (options_.resume && access(options_.save.c_str(), R_OK) != 0) {
    return fail(PK_NOT_FOUND, "there is no checkpoint %s to resume from: leave --resume out to start anew",
                options_.save.c_str());
  }
  POCKC_TRY(check_writable(options_.save));
  POCKC_TRY(check_writable(options_.save_best));
  POCKC_TRY(check_writable(options_.json));
  POCKC_TRY(model_.open(options_));
  POCKC_TRY(caches_.open(options_, model_));
  entry_ = model_.entry("train_step");
  if (entry_ == nullptr) return PK_NOT_FOUND;
  POCKC_TRY(caches_.bind("train", options_.data, model_, &entry_, &data_));
  const int loss = find_loss(model_.program, *entry_);
  if (loss < 0) return fail(PK_UNSUPPORTED, "`train_step` of this program has no output `loss`");
  outputs_.emplace_back(model_.program, entry_->outputs[loss]);
  cursor_.seed = options_.seed;
  cursor_.samples = data_.samples();
  if (options_.resume) POCKC_TRY(resume());
  POCKC_TRY(open_validation());
  const int64_t samples = data_.samples() - cursor_.held_out;
  batches_ = samples / data_.batch_size();
  if (batches_ == 0) {
    return fail(PK_INVALID_ARGUMENT,
                "%s has %" PRId64 " samples, less than one batch of %" PRId64
                ": rebuild with a smaller --batch-size",
                options_.data.c_str(), samples, data_.batch_size());
  }
  if (cursor_.step > batches_) {
    return fail(PK_BAD_FILE, "%s: step %" PRId64 " of an epoch of %" PRId64 " is out of range",
                options_.save.c_str(), cursor_.step, batches_);
  }
  if (!options_.eval.empty()) POCKC_TRY(evaluator_.open(options_.eval, model_, &caches_, "eval"));
  start_ = cursor_;
  POCKC_TRY(set_learning_rate());
  for (const StateRecord& state : model_.program.states) {
    if (state.is_mutable && model_.session.is_finite(state)) watched_.push_back(&state);
  }
  order_.resize(static_cast<size_t>(samples));
  return PK_OK;
}

int64_t Trainer::held_out() const {
  if (options_.validation_split <= 0) return 0;
  const double wanted = options_.validation_split * static_cast<double>(data_.samples());
  return wanted < 1 ? 1 : static_cast<int64_t>(wanted);
}

// The samples held back are a function of the seed and their number alone: the same ones after a resume.
Status Trainer::open_validation() {
  if (!options_.validation.empty())
    POCKC_TRY(validation_.open(options_.validation, model_, &caches_, "validation"));
  if (options_.validation_split > 0) {
    cursor_.held_out = held_out();
    training_.resize(static_cast<size_t>(data_.samples()));
    shuffle(static_cast<uint64_t>(cursor_.seed), kSplitEpoch, &training_);
    const auto middle = training_.begin() + cursor_.held_out;
    std::vector<int64_t> held_out(training_.begin(), middle);
    training_.erase(training_.begin(), middle);
    std::sort(held_out.begin(), held_out.end());
    POCKC_TRY(validation_.open_part(data_, std::move(held_out), model_));
  }
  const bool wanted = !options_.validation.empty() || options_.validation_split > 0;
  if (!wanted || validates()) return PK_OK;
  return fail(PK_UNSUPPORTED, "`eval_step` of this program has no output `loss` to validate by");
}

Status Trainer::resume() {
  const char* path = options_.save.c_str();
  POCKC_TRY(model_.session.load(path));
  Cursor saved;
  if (!saved.parse(model_.session.cursor())) {
    return fail(PK_BAD_FILE, "%s holds no position in the data: it was not saved by `pock-run train`", path);
  }
  POCKC_TRY(check_cursor(saved));
  cursor_ = saved;
  has_checkpoint_ = true;
  unsaved_ = false;
  if (!options_.quiet) {
    std::fprintf(stderr, "resuming %s after %" PRId64 " epochs and %" PRId64 " steps\n", path, saved.epoch,
                 saved.step);
  }
  return PK_OK;
}

Status Trainer::check_cursor(const Cursor& saved) const {
  const char* path = options_.save.c_str();
  if (saved.samples != data_.samples()) {
    return fail(PK_INVALID_ARGUMENT,
                "%s was saved while training on %" PRId64 " samples, %s has %" PRId64
                ": resume with the same data",
                path, saved.samples, options_.data.c_str(), data_.samples());
  }
  if (options_.seed_given && saved.seed != options_.seed) {
    return fail(PK_INVALID_ARGUMENT, "%s was saved with --seed %" PRId64 ", not %" PRId64, path, saved.seed,
                options_.seed);
  }
  if (saved.held_out == held_out()) return PK_OK;
  return fail(PK_INVALID_ARGUMENT,
              "%s was saved with %" PRId64 " samples held back for validation, not %" PRId64
              ": resume with the same --validation-split",
              path, saved.held_out, held_out());
}

Status Trainer::set_learning_rate() {
  if (options_.learning_rate < 0) return PK_OK;
  float rate = static_cast<float>(options_.learning_rate);
  const pk_tensor tensor{&rate, PK_F32, 0, {}};
  if (model_.program.find_state(kRateState) == nullptr) {
    return fail(PK_NOT_FOUND, "this program has no learning rate to set: rebuild it with an optimizer");
  }
  unsaved_ = true;
  return model_.session.write_state(kRateState, tensor);
}

Status Trainer::run() {
  const int64_t samples = static_cast<int64_t>(order_.size());
  const int64_t left_over = samples % data_.batch_size();
  if (left_over != 0 && !options_.quiet) {
    std::fprintf(stderr,
                 "the last %" PRId64 " of %" PRId64 " shuffled samples do not fill a batch of %" PRId64
                 " and are left out of each epoch\n",
                 left_over, samples, data_.batch_size());
  }
  if (cursor_.epoch >= options_.epochs && !options_.quiet) {
    std::fprintf(stderr, "%" PRId64 " epochs are done already: give a larger --epochs to go on\n",
                 cursor_.epoch);
  }
  check_patience();
  while (cursor_.epoch < options_.epochs && !stop_) POCKC_TRY(run_epoch());
  return options_.save.empty() || !unsaved_ ? PK_OK : save();
}

Status Trainer::run_epoch() {
  shuffle(static_cast<uint64_t>(cursor_.seed), static_cast<uint64_t>(cursor_.epoch), &order_);
  for (size_t i = 0; i < training_.size(); ++i) order_[i] = training_[static_cast<size_t>(order_[i])];
  timer_.clear();
  const std::string title = format("epoch %" PRId64 "/%" PRId64, cursor_.epoch + 1, options_.epochs);
  {
    Progress progress(title, batches_, !options_.quiet);
    while (cursor_.step < batches_) {
      float loss = 0;
      POCKC_TRY(step(&loss));
      if (!std::isfinite(loss)) return roll_back(describe_bad_loss(loss));
      cursor_.loss_sum += static_cast<double>(loss);
      ++cursor_.step;
      progress.show(cursor_.step, format("%.1f ms/step  loss %.4f", timer_.mean_wall(),
                                         cursor_.loss_sum / static_cast<double>(cursor_.step)));
      check_budgets();
      const bool due = plan_.due(steps_done_, false, wall_seconds());
      if (cursor_.step < batches_ && !stop_ && !due) continue;
      // Before these states are evaluated or saved over good ones.
      const StateRecord* bad = find_bad_state();
      if (bad != nullptr) return roll_back("the state `" + bad->name + "` has NaN or infinite values");
      if (cursor_.step == batches_) break;
      if (stop_) return PK_OK;
      POCKC_TRY(save_due());
    }
  }
  return finish_epoch();
}

// The time of a step is that of its calls; where these are in two entries, with what lies between them.
Status Trainer::step(float* loss) {
  const int64_t first = cursor_.step * data_.batch_size();
  const int64_t ahead = batches_ * data_.batch_size() - first;
  timer_.start();
  POCKC_TRY(data_.gather(order_.data() + first, &model_.session, ahead));
  const char* name = outputs_[0].name;
  if (data_.cache() == nullptr) timer_.start();
  POCKC_TRY(model_.session.run(entry_->name.c_str(), data_.names(), data_.tensors(), data_.count(), &name,
                               &outputs_[0].tensor, 1));
  timer_.stop();
  ++steps_done_;
  unsaved_ = true;
  *loss = outputs_[0].floats()[0];
  return PK_OK;
}

void Trainer::stop(const char* reason) {
  if (!stop_) ended_ = reason;
  stop_ = true;
}

void Trainer::check_budgets() {
  if (stop_signal() != 0) stop("signal");
  if (options_.max_steps > 0 && steps_done_ >= options_.max_steps) stop("max-steps");
  if (options_.max_seconds > 0 && wall_seconds() - started_ >= options_.max_seconds) stop("max-seconds");
}

void Trainer::check_patience() {
  if (options_.patience == 0 || cursor_.best_epoch == 0) return;
  if (cursor_.epoch - cursor_.best_epoch >= options_.patience) stop("patience");
}

const StateRecord* Trainer::find_bad_state() const {
  for (const StateRecord* state : watched_) {
    if (!model_.session.is_finite(*state)) return state;
  }
  return nullptr;
}

std::string Trainer::describe_bad_loss(float loss) const {
  return format("the loss became %s in step %" PRId64 " of epoch %" PRId64,
                std::isnan(loss) ? "NaN" : "infinite", cursor_.step + 1, cursor_.epoch + 1);
}

// The same samples in the same order come again, with half the learning rate: with the old one the same would
// happen again. No second copy of the states is kept: the last good ones are those of the checkpoint, or,
// before there is one, those of the program.
Status Trainer::roll_back(const std::string& what) {
  const char* kept = options_.save.empty() ? "" : "; the last checkpoint, if any, is from before";
  float rate = 0;
  pk_tensor tensor{&rate, PK_F32, 0, {}};
  const bool has_rate = model_.program.find_state(kRateState) != nullptr;
  if (has_rate) POCKC_TRY(model_.session.read_state(kRateState, &tensor));
  if (!has_rate || cursor_.retries >= options_.retries) {
    return fail(PK_INVALID_ARGUMENT, "%s: try a lower --learning-rate (%" PRId64 " roll-backs done)%s",
                what.c_str(), cursor_.retries, kept);
  }
  const int64_t retries = cursor_.retries + 1;
  POCKC_TRY(restore());
  cursor_.retries = retries;
  rate *= 0.5f;
  POCKC_TRY(model_.session.write_state(kRateState, tensor));
  unsaved_ = true;
  std::fprintf(stderr,
               "pock-run: %s: back to epoch %" PRId64 ", step %" PRId64
               ", with learning rate %g (roll-back %" PRId64 " of %" PRId64 ")\n",
               what.c_str(), cursor_.epoch + 1, cursor_.step + 1, static_cast<double>(rate), retries,
               options_.retries);
  return PK_OK;
}

Status Trainer::restore() {
  if (!has_checkpoint_) {
    model_.session.reset();
    cursor_ = start_;
  } else {
    POCKC_TRY(model_.session.load(options_.save.c_str()));
    if (!cursor_.parse(model_.session.cursor()))
      return fail(PK_BAD_FILE, "%s is no longer the file that was saved", options_.save.c_str());
  }
  epochs_json_.resize(static_cast<size_t>(cursor_.epoch - start_.epoch));
  check_budgets();
  return PK_OK;
}

// Evaluates, prints and records the epoch, moves on to the next one, saves. A signal during an evaluation
// leaves the epoch open: it is evaluated after the resume, so that early stopping sees what it would have
// seen.
Status Trainer::finish_epoch() {
  const bool evaluates = !options_.eval.empty() || validates();
  if (evaluates) POCKC_TRY(evaluate_epoch());
  check_budgets();
  if (evaluates && stop_signal() != 0) return PK_OK;
  const double loss = cursor_.loss_sum / static_cast<double>(batches_);
  ++cursor_.epoch;
  cursor_.step = 0;
  cursor_.loss_sum = 0;
  unsaved_ = true;
  const bool best = validates() && (cursor_.best_epoch == 0 || validation_.loss() < cursor_.best_loss) &&
                    std::isfinite(validation_.loss());
  if (best) {
    cursor_.best_epoch = cursor_.epoch;
    cursor_.best_loss = validation_.loss();
  }
  if (!options_.quiet) print_epoch(loss);
  record_epoch(loss);
  if (best && !options_.save_best.empty()) POCKC_TRY(write(options_.save_best));
  check_patience();
  // The last epoch is saved by run().
  if (options_.save.empty() || stop_ || cursor_.epoch >= options_.epochs) return PK_OK;
  return plan_.due(steps_done_, true, wall_seconds()) ? save_due() : PK_OK;
}

Status Trainer::evaluate_epoch() {
  if (!options_.eval.empty()) POCKC_TRY(evaluator_.run(&model_, !options_.quiet));
  return validates() ? validation_.run(&model_, !options_.quiet) : PK_OK;
}

void Trainer::print_epoch(double loss) const {
  std::string line = format("epoch %" PRId64 "/%" PRId64 "  %.1f ms/step  loss %.4f", cursor_.epoch,
                            options_.epochs, timer_.mean_wall(), loss);
  if (!options_.eval.empty() && !std::isnan(evaluator_.accuracy()))
    line += format("  accuracy %.4f", evaluator_.accuracy());
  else if (!options_.eval.empty())
    line += format("  eval loss %.4f", evaluator_.loss());
  if (validates()) line += format("  validation loss %.4f", validation_.loss());
  if (validates() && cursor_.best_epoch == cursor_.epoch) line += " (best)";
  std::printf("%s  peak %s\n", line.c_str(), format_bytes(model_.session.memory().used_peak_bytes).c_str());
  std::fflush(stdout);
}

void Trainer::record_epoch(double loss) {
  const bool evaluated = !options_.eval.empty();
  JsonObject epoch;
  epoch.add("epoch", cursor_.epoch).add("steps", static_cast<int64_t>(timer_.steps())).add("loss", loss);
  epoch.add("eval_loss", evaluated ? evaluator_.loss() : NAN)
      .add("accuracy", evaluated ? evaluator_.accuracy() : NAN);
  epoch.add("validation_loss", validates() ? validation_.loss() : NAN);
  epoch.add("ms_per_step", timer_.mean_wall()).add("ms_per_step_median", timer_.wall(0.5));
  epoch.add("cpu_ms_per_step", timer_.mean_cpu()).add("cpu_ms_per_step_median", timer_.cpu(0.5));
  epochs_json_.push_back(epoch.text());
}

Status Trainer::write(const std::string& path) {
  POCKC_TRY(model_.session.save(path.c_str(), cursor_.json().c_str()));
  struct stat information = {};
  if (stat(path.c_str(), &information) != 0) information.st_size = 0;
  plan_.written(static_cast<uint64_t>(information.st_size), wall_seconds());
  return PK_OK;
}

Status Trainer::save() {
  POCKC_TRY(write(options_.save));
  has_checkpoint_ = true;
  unsaved_ = false;
  return PK_OK;
}

// A full or worn-out card ends no run: what is there stays, and the next save may succeed. The last one must.
Status Trainer::save_due() {
  if (options_.save.empty() || save() == PK_OK) return PK_OK;
  plan_.failed(wall_seconds());
  ++failed_saves_;
  std::fprintf(stderr, "pock-run: %s; training goes on\n", pk_last_error());
  return PK_OK;
}

Status Trainer::report() const {
  if (options_.json.empty()) return PK_OK;
  JsonObject report;
  report.add("model", options_.model).add("samples", data_.samples()).add("batch_size", data_.batch_size());
  report.add("seed", cursor_.seed).add("steps", steps_done_).add("stop_signal", int64_t{stop_signal()});
  report.add("ended", ended_).add("seconds", wall_seconds() - started_).add("roll_backs", cursor_.retries);
  report.add("held_out", cursor_.held_out).add("best_epoch", cursor_.best_epoch);
  report.add("best_validation_loss", cursor_.best_epoch == 0 ? NAN : cursor_.best_loss);
  report.add("saves", plan_.saves()).add("written_bytes", static_cast<int64_t>(plan_.written_bytes()));
  report.add("deferred_saves", plan_.deferred()).add("failed_saves", failed_saves_);
  float scale = 0;
  int64_t skipped = 0;
  const bool is_dynamic = model_.read_loss_scale(&scale, &skipped);
  report.add("loss_scale", is_dynamic ? static_cast<double>(scale) : NAN).add("skipped_steps", skipped);
  std::string epochs;
  for (const std::string& epoch : epochs_json_) epochs += (epochs.empty() ? "" : ", ") + epoch;
  report.add_json("epochs", "[" + epochs + "]");
  caches_.describe(&report);
  model_.describe(&report);
  return write_report(options_.json, report.text() + "\n");
}

// What the user cannot see from the epochs: that the run ended before them, what was skipped, what was
// written.
void Trainer::print_end() const {
  if (options_.quiet) return;
  float scale = 0;
  int64_t skipped = 0;
  if (model_.read_loss_scale(&scale, &skipped)) {
    std::fprintf(stderr, "loss scale %.10g; %" PRId64 " steps skipped, of which a gradient was not finite\n",
                 static_cast<double>(scale), skipped);
  }
  if (std::strcmp(ended_, "patience") == 0) {
    std::fprintf(stderr, "stopped: no epoch since %" PRId64 " had a validation loss below %.4f\n",
                 cursor_.best_epoch, cursor_.best_loss);
  } else if (std::strncmp(ended_, "max-", 4) == 0) {
    std::fprintf(stderr, "stopped by --%s after %" PRId64 " steps of this run%s\n", ended_, steps_done_,
                 options_.save.empty() ? "" : ": continue with --resume");
  }
  if (plan_.saves() == 0) return;
  std::fprintf(stderr, "%" PRId64 " checkpoints written, %s", plan_.saves(),
               format_bytes(plan_.written_bytes()).c_str());
  if (plan_.deferred() > 0) std::fprintf(stderr, "; %" PRId64 " saves had to wait", plan_.deferred());
  std::fprintf(stderr, "\n");
}

}  // namespace

int train(const Options& options) {
  catch_stop_signals();
  Trainer trainer(options);
  if (trainer.open() != PK_OK || trainer.run() != PK_OK || trainer.report() != PK_OK) return report_failure();
  trainer.print_end();
  if (stop_signal() == 0) return 0;
  const std::string next = options.save.empty() ? "nothing was saved: give --save to be able to resume"
                                                : "saved to " + options.save + ": continue with --resume";
  std::fprintf(stderr, "pock-run: %s by signal %d after %" PRId64 " steps; %s\n",
               options.save.empty() ? "stopped" : "paused", stop_signal(), trainer.steps_done(),
               next.c_str());
  return options.save.empty() ? 128 + stop_signal() : kPaused;
}

}  // namespace pockc::cli
