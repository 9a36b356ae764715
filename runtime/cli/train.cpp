// train: epochs over shuffled batches, checkpoints that carry the position in the data.
#include <unistd.h>

#include <cinttypes>
#include <cmath>
#include <cstdio>

#include "commands.h"
#include "error.h"
#include "json.h"

namespace pockc::cli {
namespace {

constexpr const char* kRateState = "pockc.learning_rate";

// Where a run is: everything that decides which samples come next.
struct Cursor {
  int64_t epoch = 0;  // complete epochs
  int64_t step = 0;   // steps done of the current one
  int64_t seed = 0;
  int64_t samples = 0;
  double loss_sum = 0;  // of the current epoch

  std::string json() const {
    JsonObject object;
    object.add("epoch", epoch)
        .add("step", step)
        .add("seed", seed)
        .add("samples", samples)
        .add("loss_sum", loss_sum);
    return object.text();
  }

  bool parse(const std::string& text) {
    Json json;
    if (!parse_json(text.data(), text.size(), &json)) return false;
    const Json* sum = json.find("loss_sum");
    if (sum == nullptr || sum->kind != Json::Kind::kNumber) return false;
    loss_sum = sum->number;
    return integer(json, "epoch", &epoch) && integer(json, "step", &step) && integer(json, "seed", &seed) &&
           integer(json, "samples", &samples);
  }

 private:
  static bool integer(const Json& json, const char* key, int64_t* out) {
    const Json* value = json.find(key);
    if (value == nullptr || !value->integral || value->integer < 0) return false;
    *out = value->integer;
    return true;
  }
};

class Trainer {
 public:
  explicit Trainer(const Options& options) : options_(options) {}

  Status open();
  Status run();
  Status report() const;
  int64_t steps_done() const { return steps_done_; }
  bool stopped_early() const { return stop_; }

 private:
  Status resume();
  Status set_learning_rate();
  Status run_epoch();
  Status step(const int64_t* indices, float* loss);
  Status finish_epoch();
  Status save();
  std::string timing() const;
  // Steps since the checkpoint was last written.
  bool save_due() const { return options_.save_every > 0 && steps_done_ % options_.save_every == 0; }

  const Options& options_;
  Model model_;
  const EntryRecord* entry_ = nullptr;
  Dataset data_;
  Evaluator evaluator_;
  std::vector<Output> outputs_;  // the loss alone
  Cursor cursor_;
  std::vector<int64_t> order_;
  int64_t batches_ = 0;
  int64_t steps_done_ = 0;  // of this run
  bool stop_ = false;
  StepTimer timer_;
  std::string epochs_json_;
};

Status Trainer::open() {
  // Before the program is loaded: a missing checkpoint is the likelier mistake, and the cheaper to find.
  if (options_.resume && access(options_.save.c_str(), R_OK) != 0) {
    return fail(PK_NOT_FOUND, "there is no checkpoint %s to resume from: leave --resume out to start anew",
                options_.save.c_str());
  }
  POCKC_TRY(check_writable(options_.save));
  POCKC_TRY(check_writable(options_.json));
  POCKC_TRY(model_.open(options_));
  entry_ = model_.entry("train_step");
  if (entry_ == nullptr) return PK_NOT_FOUND;
  const int loss = find_loss(model_.program, *entry_);
  if (loss < 0) return fail(PK_UNSUPPORTED, "`train_step` of this program has no output `loss`");
  outputs_.emplace_back(model_.program, entry_->outputs[loss]);
  POCKC_TRY(data_.open(options_.data, model_.program, *entry_));
  batches_ = data_.samples() / data_.batch_size();
  if (batches_ == 0) {
    return fail(PK_INVALID_ARGUMENT,
                "%s has %" PRId64 " samples, less than one batch of %" PRId64
                ": rebuild with a smaller --batch-size",
                options_.data.c_str(), data_.samples(), data_.batch_size());
  }
  if (!options_.eval.empty()) POCKC_TRY(evaluator_.open(options_.eval, model_));
  cursor_.seed = options_.seed;
  cursor_.samples = data_.samples();
  if (options_.resume) POCKC_TRY(resume());
  POCKC_TRY(set_learning_rate());
  order_.resize(static_cast<size_t>(data_.samples()));
  return PK_OK;
}

Status Trainer::resume() {
  const char* path = options_.save.c_str();
  POCKC_TRY(model_.session.load(path));
  Cursor saved;
  if (!saved.parse(model_.session.cursor())) {
    return fail(PK_BAD_FILE, "%s holds no position in the data: it was not saved by `pock-run train`", path);
  }
  if (saved.samples != data_.samples() || saved.step >= batches_) {
    return fail(PK_INVALID_ARGUMENT,
                "%s was saved while training on %" PRId64 " samples, %s has %" PRId64
                ": resume with the same data",
                path, saved.samples, options_.data.c_str(), data_.samples());
  }
  if (options_.seed_given && saved.seed != options_.seed) {
    return fail(PK_INVALID_ARGUMENT, "%s was saved with --seed %" PRId64 ", not %" PRId64, path, saved.seed,
                options_.seed);
  }
  cursor_ = saved;
  if (!options_.quiet) {
    std::fprintf(stderr, "resuming %s after %" PRId64 " epochs and %" PRId64 " steps\n", path, saved.epoch,
                 saved.step);
  }
  return PK_OK;
}

Status Trainer::set_learning_rate() {
  if (options_.learning_rate < 0) return PK_OK;
  float rate = static_cast<float>(options_.learning_rate);
  const pk_tensor tensor{&rate, PK_F32, 0, {}};
  if (model_.program.find_state(kRateState) == nullptr) {
    return fail(PK_NOT_FOUND, "this program has no learning rate to set: rebuild it with an optimizer");
  }
  return model_.session.write_state(kRateState, tensor);
}

Status Trainer::run() {
  const int64_t left_over = data_.samples() % data_.batch_size();
  if (left_over != 0 && !options_.quiet) {
    std::fprintf(stderr,
                 "the last %" PRId64 " of %" PRId64 " shuffled samples do not fill a batch of %" PRId64
                 " and are left out of each epoch\n",
                 left_over, data_.samples(), data_.batch_size());
  }
  if (cursor_.epoch >= options_.epochs && !options_.quiet) {
    std::fprintf(stderr, "%" PRId64 " epochs are done already: give a larger --epochs to go on\n",
                 cursor_.epoch);
  }
  while (cursor_.epoch < options_.epochs && !stop_) POCKC_TRY(run_epoch());
  return options_.save.empty() ? PK_OK : save();
}

Status Trainer::run_epoch() {
  shuffle(static_cast<uint64_t>(cursor_.seed), static_cast<uint64_t>(cursor_.epoch), &order_);
  timer_.clear();
  const std::string title = format("epoch %" PRId64 "/%" PRId64, cursor_.epoch + 1, options_.epochs);
  {
    Progress progress(title, batches_, !options_.quiet);
    while (cursor_.step < batches_) {
      float loss = 0;
      POCKC_TRY(step(order_.data() + cursor_.step * data_.batch_size(), &loss));
      cursor_.loss_sum += static_cast<double>(loss);
      ++cursor_.step;
      ++steps_done_;
      progress.show(cursor_.step, format("%.1f ms/step  loss %.4f", timer_.mean_wall(),
                                         cursor_.loss_sum / static_cast<double>(cursor_.step)));
      stop_ = stop_signal() != 0 || (options_.max_steps > 0 && steps_done_ >= options_.max_steps);
      if (cursor_.step == batches_) break;
      if (stop_) return PK_OK;
      if (save_due()) POCKC_TRY(save());
    }
  }
  return finish_epoch();
}

Status Trainer::step(const int64_t* indices, float* loss) {
  POCKC_TRY(data_.gather(indices, &model_.session));
  const char* name = outputs_[0].name;
  timer_.start();
  POCKC_TRY(model_.session.run("train_step", data_.names(), data_.tensors(), data_.count(), &name,
                               &outputs_[0].tensor, 1));
  timer_.stop();
  *loss = outputs_[0].floats()[0];
  if (std::isfinite(*loss)) return PK_OK;
  return fail(PK_INVALID_ARGUMENT,
              "the loss became %s in step %" PRId64 " of epoch %" PRId64 ": try a lower --learning-rate%s",
              std::isnan(*loss) ? "NaN" : "infinite", cursor_.step + 1, cursor_.epoch + 1,
              options_.save.empty() ? "" : "; the last checkpoint, if any, is from before");
}

std::string Trainer::timing() const { return format("%.1f ms/step", timer_.mean_wall()); }

// Prints and records the epoch, moves on to the next one, saves.
Status Trainer::finish_epoch() {
  const double loss = cursor_.loss_sum / static_cast<double>(batches_);
  const bool evaluates = !options_.eval.empty() && stop_signal() == 0;
  if (evaluates) POCKC_TRY(evaluator_.run(&model_, !options_.quiet));
  const bool evaluated = evaluates && stop_signal() == 0;
  ++cursor_.epoch;
  cursor_.step = 0;
  cursor_.loss_sum = 0;
  const pk_memory memory = model_.session.memory();
  if (!options_.quiet) {
    std::string line = format("epoch %" PRId64 "/%" PRId64 "  %s  loss %.4f", cursor_.epoch, options_.epochs,
                              timing().c_str(), loss);
    if (evaluated && !std::isnan(evaluator_.accuracy()))
      line += format("  accuracy %.4f", evaluator_.accuracy());
    else if (evaluated)
      line += format("  eval loss %.4f", evaluator_.loss());
    std::printf("%s  peak %s\n", line.c_str(), format_bytes(memory.used_peak_bytes).c_str());
    std::fflush(stdout);
  }
  JsonObject epoch;
  epoch.add("epoch", cursor_.epoch).add("steps", static_cast<int64_t>(timer_.steps())).add("loss", loss);
  epoch.add("eval_loss", evaluated ? evaluator_.loss() : NAN)
      .add("accuracy", evaluated ? evaluator_.accuracy() : NAN);
  epoch.add("ms_per_step", timer_.mean_wall()).add("ms_per_step_median", timer_.wall(0.5));
  epoch.add("cpu_ms_per_step", timer_.mean_cpu()).add("cpu_ms_per_step_median", timer_.cpu(0.5));
  epochs_json_ += (epochs_json_.empty() ? "" : ", ") + epoch.text();
  stop_ = stop_ || stop_signal() != 0;
  // The last epoch is saved by run().
  return options_.save.empty() || stop_ || cursor_.epoch >= options_.epochs ? PK_OK : save();
}

Status Trainer::save() { return model_.session.save(options_.save.c_str(), cursor_.json().c_str()); }

Status Trainer::report() const {
  if (options_.json.empty()) return PK_OK;
  JsonObject report;
  report.add("model", options_.model).add("samples", data_.samples()).add("batch_size", data_.batch_size());
  report.add("seed", cursor_.seed).add("steps", steps_done_).add("stop_signal", int64_t{stop_signal()});
  report.add_json("epochs", "[" + epochs_json_ + "]");
  model_.describe(&report);
  return write_report(options_.json, report.text() + "\n");
}

}  // namespace

int train(const Options& options) {
  catch_stop_signals();
  Trainer trainer(options);
  if (trainer.open() != PK_OK || trainer.run() != PK_OK || trainer.report() != PK_OK) return report_failure();
  if (stop_signal() == 0) return 0;
  const std::string next = options.save.empty() ? "nothing was saved: give --save to be able to resume"
                                                : "saved to " + options.save + ": continue with --resume";
  std::fprintf(stderr, "pock-run: stopped by signal %d after %" PRId64 " steps; %s\n", stop_signal(),
               trainer.steps_done(), next.c_str());
  return 128 + stop_signal();
}

}  // namespace pockc::cli
