// What keeps a training run safe that nobody watches: roll-back, early stopping, budgets, pauses, bounded
// writes.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>

#include "check.h"
#include "cursor.h"
#include "faulty_disk.h"
#include "save_plan.h"
#include "workspace.h"

using namespace pockc;
using namespace pockc::test;
using namespace pockc::cli;

namespace {

// Learning rate 3 makes every weight jump to twice its distance from the mean, on the other side: the loss is
// infinite after some sixty steps of five per epoch. With half of it the distance halves instead.
void let_diverge(Workspace* workspace) {
  workspace->options.learning_rate = 3;
  workspace->options.epochs = 30;
  workspace->options.save_every = 4;
  workspace->options.json = workspace->directory.path("report.json");
}

// The weights leave their start for the mean of the training samples and pass by the validation samples.
void let_overfit(Workspace* workspace) {
  std::vector<float> x;
  for (int i = 0; i < 3 * 4; ++i) x.push_back(0.2f * 1.3f + 0.8f * static_cast<float>(1 + i % 4));
  workspace->write_samples("validation.npz", x, {0, 1, 2});
  workspace->options.validation = workspace->directory.path("validation.npz");
  workspace->options.save_best = workspace->directory.path("best.ckpt");
  workspace->options.json = workspace->directory.path("report.json");
  workspace->options.learning_rate = 0.02;
  workspace->options.epochs = 40;
  workspace->options.patience = 3;
}

Cursor cursor_of(const Workspace& workspace) {
  Model model;
  Cursor cursor;
  if (model.open(workspace.options) != PK_OK || model.session.load(workspace.options.save.c_str()) != PK_OK ||
      !cursor.parse(model.session.cursor())) {
    CHECK(false && "no cursor");
  }
  return cursor;
}

float learning_rate_of(const Workspace& workspace) {
  Model model;
  float rate = -1;
  pk_tensor tensor{&rate, PK_F32, 0, {}};
  if (model.open(workspace.options) != PK_OK || model.session.load(workspace.options.save.c_str()) != PK_OK ||
      model.session.read_state("pockc.learning_rate", &tensor) != PK_OK) {
    CHECK(false && "no learning rate");
  }
  return rate;
}

}  // namespace

TEST("a run that diverges goes back to its checkpoint with half the learning rate and ends well") {
  Workspace workspace;
  let_diverge(&workspace);
  REQUIRE(train(workspace.options) == 0);
  const Json report = workspace.report();
  CHECK(report.find("roll_backs")->integer == 1);
  CHECK(report.find("epochs")->items.size() == 30);
  CHECK(report.find("steps")->integer > 150);  // some were done twice
  CHECK(report.find("epochs")->items[29].find("loss")->number < 100);
  CHECK(learning_rate_of(workspace) == 1.5f);
  CHECK(cursor_of(workspace).epoch == 30 && cursor_of(workspace).retries == 1);

  // A pause where a checkpoint is due anyway changes nothing, before the roll-back and after it.
  for (const int64_t cut : {8, 48, 72, 80}) {
    Workspace resumed;
    let_diverge(&resumed);
    resumed.options.max_steps = cut;
    REQUIRE(train(resumed.options) == 0);
    resumed.options.max_steps = 0;
    resumed.options.resume = true;
    resumed.options.learning_rate = -1;
    REQUIRE(train(resumed.options) == 0);
    CHECK(resumed.checkpoint() == workspace.checkpoint());
  }
}

TEST("without a checkpoint the roll-back starts anew; one of another run is left alone") {
  Workspace workspace;
  REQUIRE(train(workspace.options) == 0);
  const std::string before = workspace.checkpoint();
  let_diverge(&workspace);
  workspace.options.save_every = 0;
  workspace.options.epochs = 1;
  // So large that half of it would not do either: the first roll-back comes before any save.
  workspace.options.learning_rate = 1e25;
  workspace.options.retries = 2;
  CHECK(train(workspace.options) == 1);
  CHECK(contains(pk_last_error(), "2 roll-backs done"));
  CHECK(workspace.checkpoint() == before);
  workspace.options.save.clear();
  let_diverge(&workspace);
  workspace.options.save_every = 0;
  REQUIRE(train(workspace.options) == 0);
  CHECK(workspace.report().find("epochs")->items.size() == 30);
  CHECK(workspace.report().find("roll_backs")->integer == 1);
  CHECK(workspace.checkpoint().empty() && read_file(workspace.directory.path("a.ckpt")) == before);
}

TEST("states that are not finite are never saved, even while the loss still is") {
  Workspace workspace;
  workspace.options.learning_rate = 3e38;
  workspace.options.save_every = 1;
  workspace.options.retries = 0;
  CHECK(train(workspace.options) == 1);
  CHECK(contains(pk_last_error(), "the state `weight` has NaN or infinite values"));
  CHECK(access(workspace.options.save.c_str(), F_OK) != 0);
}

TEST("samples that overflow whatever the learning rate end the run after its retries") {
  Workspace workspace;
  workspace.write_samples("train.npz", std::vector<float>(16, 1e30f), {0, 1, 2, 3});
  CHECK(train(workspace.options) == 1);
  CHECK(contains(pk_last_error(), "the loss became infinite in step 1 of epoch 1"));
  CHECK(contains(pk_last_error(), "3 roll-backs done"));
}

TEST("training stops when the validation loss no longer falls, and the best epoch is kept") {
  Workspace workspace;
  let_overfit(&workspace);
  REQUIRE(train(workspace.options) == 0);
  const Json report = workspace.report();
  const int64_t best = report.find("best_epoch")->integer;
  CHECK(best > 1 && best < 30);
  CHECK(report.find("ended")->text == "patience");
  const std::vector<Json>& epochs = report.find("epochs")->items;
  REQUIRE(static_cast<int64_t>(epochs.size()) == best + 3);
  for (const Json& epoch : epochs) {
    const double loss = epoch.find("validation_loss")->number;
    CHECK(loss >= report.find("best_validation_loss")->number);
  }
  CHECK(epochs.back().find("loss")->number < epochs[static_cast<size_t>(best) - 1].find("loss")->number);

  // The best checkpoint is that of a run that ends there.
  Workspace shorter;
  let_overfit(&shorter);
  shorter.options.epochs = best;
  REQUIRE(train(shorter.options) == 0);
  CHECK(shorter.checkpoint() == read_file(workspace.options.save_best));
  CHECK(workspace.checkpoint() != read_file(workspace.options.save_best));

  // Resumed, it has nothing more to do, until it is given more patience.
  const std::string ended = workspace.checkpoint();
  workspace.options.resume = true;
  workspace.options.learning_rate = -1;
  REQUIRE(train(workspace.options) == 0);
  CHECK(workspace.checkpoint() == ended);
  workspace.options.patience = 4;
  REQUIRE(train(workspace.options) == 0);
  CHECK(cursor_of(workspace).epoch == best + 4);
}

TEST("early stopping sees the same in a run that is cut anywhere") {
  Workspace straight;
  let_overfit(&straight);
  straight.options.validation.clear();
  straight.options.validation_split = 0.3;
  straight.options.patience = 2;
  straight.options.epochs = 6;
  REQUIRE(train(straight.options) == 0);
  CHECK(straight.report().find("held_out")->integer == 3);
  for (int64_t cut = 1; cut < 24; ++cut) {
    Workspace resumed;
    let_overfit(&resumed);
    resumed.options.validation.clear();
    resumed.options.validation_split = 0.3;
    resumed.options.patience = 2;
    resumed.options.epochs = 6;
    resumed.options.max_steps = cut;
    REQUIRE(train(resumed.options) == 0);
    resumed.options.max_steps = 0;
    resumed.options.resume = true;
    REQUIRE(train(resumed.options) == 0);
    CHECK(resumed.checkpoint() == straight.checkpoint());
    CHECK(read_file(resumed.options.save_best) == read_file(straight.options.save_best));
  }
}

TEST("samples that are held back are not trained on, and are the same after a resume") {
  Workspace workspace;
  std::vector<float> x(12 * 4, 1.0f);
  x[20] = 1e30f;  // of sample 5: the loss of its batch is infinite
  workspace.write_samples("train.npz", x, std::vector<int64_t>(12, 0));
  workspace.options.validation_split = 0.5;
  workspace.options.retries = 0;
  int passed = 0;
  for (int64_t seed = 0; seed < 12; ++seed) {
    workspace.options.seed = seed;
    workspace.options.resume = false;
    workspace.options.max_steps = 2;
    if (train(workspace.options) != 0) continue;
    workspace.options.max_steps = 0;
    workspace.options.resume = true;
    if (train(workspace.options) == 0) ++passed;
  }
  CHECK(passed > 0 && passed < 12);
  workspace.options.resume = true;
  workspace.options.seed_given = false;
  workspace.options.validation_split = 0.25;
  CHECK(train(workspace.options) == 1);
  CHECK(contains(pk_last_error(), "--validation-split"));
}

TEST("a time budget ends the run after a step, and the run goes on exactly") {
  Workspace workspace;
  workspace.options.epochs = 1000000000;
  workspace.options.max_seconds = 0.05;
  workspace.options.json = workspace.directory.path("report.json");
  REQUIRE(train(workspace.options) == 0);
  CHECK(workspace.report().find("ended")->text == "max-seconds");
  const int64_t steps = workspace.report().find("steps")->integer;
  Workspace counted;
  counted.options.epochs = 1000000000;
  counted.options.max_steps = steps + 3;
  REQUIRE(train(counted.options) == 0);
  workspace.options.max_seconds = 0;
  workspace.options.max_steps = 3;
  workspace.options.resume = true;
  REQUIRE(train(workspace.options) == 0);
  CHECK(workspace.checkpoint() == counted.checkpoint());
}

TEST("a save that is due and fails does not end the run; the last one does") {
  Workspace good, workspace;
  REQUIRE(train(good.options) == 0);
  workspace.options.file_system = &faulty_disk();
  workspace.options.save_every = 2;
  workspace.options.json = workspace.directory.path("report.json");
  set_fault(Fault::kFail, 3, ENOSPC);
  REQUIRE(train(workspace.options) == 0);
  CHECK(workspace.report().find("failed_saves")->integer == 1);
  CHECK(workspace.checkpoint() == good.checkpoint());
  set_fault(Fault::kStayBroken, 0, EIO);
  CHECK(train(workspace.options) == 1);
  CHECK(contains(pk_last_error(), "the previous file, if any, is intact"));
  CHECK(workspace.checkpoint() == good.checkpoint());
}

TEST("saves are due by steps, by time and at the end of epochs") {
  SavePlan none(0, 0, 0), steps(3, 0, 0), time(0, 10, 0);
  none.start(100);
  time.start(100);
  CHECK(!none.due(5, false, 1e6) && none.due(5, true, 101));
  CHECK(!steps.due(2, false, 0) && steps.due(3, false, 0));
  CHECK(!time.due(1, false, 109.9) && time.due(2, false, 110));
  time.written(50, 111);
  CHECK(!time.due(3, false, 120.9) && time.due(4, false, 121));
  time.failed(121);
  CHECK(!time.due(5, false, 130.9) && time.due(6, false, 131));
  CHECK(time.saves() == 1 && time.written_bytes() == 50 && time.deferred() == 0);
}

TEST("what is written per hour stays below its limit, and a save that has to wait is not lost") {
  SavePlan plan(1, 0, 7200);  // two bytes a second
  plan.start(0);
  uint64_t written = 0;
  for (int step = 1; step <= 3600; ++step) {  // of a second
    if (!plan.due(step, false, step)) continue;
    plan.written(100, step);
    written += 100;
    CHECK(written <= 2 * static_cast<uint64_t>(step) + 100);
  }
  CHECK(written == 7200);
  CHECK(plan.deferred() > 60 && plan.written_bytes() == 7200);

  SavePlan sparse(10, 0, 7200);
  sparse.start(0);
  CHECK(sparse.due(10, false, 10));
  sparse.written(100, 10);
  CHECK(!sparse.due(20, false, 20) && !sparse.due(25, false, 59) && sparse.due(26, false, 60));
  sparse.written(100, 60);  // and another file, which had to be written
  sparse.written(100, 60);
  CHECK(!sparse.due(30, false, 159) && sparse.due(31, false, 160));
}

TEST("a run reports what it has written") {
  Workspace workspace;
  workspace.options.json = workspace.directory.path("report.json");
  workspace.options.save_every = 1;
  REQUIRE(train(workspace.options) == 0);
  Json report = workspace.report();
  CHECK(report.find("saves")->integer == 15);
  const int64_t size = static_cast<int64_t>(workspace.checkpoint().size());
  CHECK(std::llabs(report.find("written_bytes")->integer - 15 * size) <
        15 * 64);  // numbers of varying length
  CHECK(report.find("ended")->text == "epochs");
  const std::string straight = workspace.checkpoint();
  workspace.options.max_megabytes_per_hour = 1e-6;
  REQUIRE(train(workspace.options) == 0);
  report = workspace.report();
  CHECK(report.find("saves")->integer == 2);  // the first and the last one
  CHECK(report.find("deferred_saves")->integer >= 1);
  CHECK(workspace.checkpoint() == straight);
}

TEST("cursors of before there was validation are read") {
  Cursor cursor;
  CHECK(cursor.parse("{\"epoch\": 2, \"step\": 1, \"seed\": 0, \"samples\": 11, \"loss_sum\": 0.5}"));
  CHECK(cursor.epoch == 2 && cursor.best_epoch == 0);
  CHECK(!cursor.parse("{\"epoch\": 2, \"step\": 1, \"seed\": 0, \"samples\": 11}"));
  CHECK(!cursor.parse("{\"epoch\": -2, \"step\": 1, \"seed\": 0, \"samples\": 11, \"loss_sum\": 0.5}"));
}

TEST("a signal during an evaluation leaves the epoch open, and the run goes on exactly") {
  const auto prepare = [](Workspace* workspace) {
    let_overfit(workspace);
    const size_t samples = 400000;  // so that nearly all of the time is spent on them
    workspace->write_samples("validation.npz", std::vector<float>(samples * 4, 1.5f),
                             std::vector<int64_t>(samples, 0));
    workspace->options.epochs = 1;
    workspace->options.save_best.clear();
  };
  Workspace interrupted;
  prepare(&interrupted);
  const pid_t child = fork();
  if (child == 0) {
    interrupted.options.epochs = 1000000;
    interrupted.options.patience = 0;
    _exit(train(interrupted.options));
  }
  usleep(300 * 1000);
  kill(child, SIGTERM);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
  const Cursor cursor = cursor_of(interrupted);
  CHECK(cursor.step == 5);
  Workspace straight;
  prepare(&straight);
  straight.options.epochs = interrupted.options.epochs = cursor.epoch + 1;
  REQUIRE(train(straight.options) == 0);
  interrupted.options.resume = true;
  REQUIRE(train(interrupted.options) == 0);
  CHECK(interrupted.checkpoint() == straight.checkpoint());
}

int main() { return run_tests(); }
