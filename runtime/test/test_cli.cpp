// pock-run's verbs, called as functions: exact resume, exit statuses, what stays on disk after a failure.
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "board.h"
#include "check.h"
#include "commands.h"
#include "json.h"
#include "npz.h"
#include "safetensors.h"
#include "workspace.h"

using namespace pockc;
using namespace pockc::test;
using namespace pockc::cli;

namespace {

Options parse(std::vector<const char*> arguments, bool* good, std::string* error) {
  arguments.insert(arguments.begin(), "pock-run");
  Options options;
  *good = parse_arguments(static_cast<int>(arguments.size()), const_cast<char**>(arguments.data()), &options,
                          error);
  return options;
}

}  // namespace

TEST("flags are read, and mistakes are named") {
  bool good;
  std::string error;
  Options options = parse({"train", "m.pock", "--data", "a.npz", "--epochs=7", "--save", "c", "--resume",
                           "--learning-rate", "1e-3", "--seed", "0"},
                          &good, &error);
  CHECK(good && options.epochs == 7 && options.resume && options.learning_rate == 1e-3 && options.seed_given);
  parse({"train", "m.pock"}, &good, &error);
  CHECK(!good && contains(error, "--data"));
  parse({"train", "m.pock", "--data", "a", "--epochs", "0"}, &good, &error);
  CHECK(!good && contains(error, "--epochs wants a whole number from 1 on, not `0`"));
  parse({"train", "m.pock", "--data", "a", "--resume"}, &good, &error);
  CHECK(!good && contains(error, "--save"));
  parse({"eval", "m.pock", "--data", "a", "--epochs", "1"}, &good, &error);
  CHECK(!good && contains(error, "unknown flag --epochs of `eval`"));
  parse({"infer", "m.pock", "--data", "a"}, &good, &error);
  CHECK(!good && contains(error, "-o"));
  parse({"dance"}, &good, &error);
  CHECK(!good && contains(error, "dance"));
  parse({"train", "m.pock", "--data"}, &good, &error);
  CHECK(!good && contains(error, "needs a value"));
  options = parse({"train", "m.pock", "--data", "a", "--save", "c", "--save-every", "5m"}, &good, &error);
  CHECK(good && options.save_seconds == 300 && options.save_every == 0);
  options = parse({"train", "m.pock", "--data", "a", "--save", "c", "--save-every=20"}, &good, &error);
  CHECK(good && options.save_seconds == 0 && options.save_every == 20);
  for (const char* wrong : {"0", "s", "5d", "-1s", "1.5m"}) {
    parse({"train", "m.pock", "--data", "a", "--save", "c", "--save-every", wrong}, &good, &error);
    CHECK(!good && contains(error, "90s"));
  }
  parse({"train", "m.pock", "--data", "a", "--patience", "2"}, &good, &error);
  CHECK(!good && contains(error, "--validation"));
  parse({"train", "m.pock", "--data", "a", "--validation", "b", "--validation-split", "0.1"}, &good, &error);
  CHECK(!good && contains(error, "not both"));
  parse({"train", "m.pock", "--data", "a", "--validation-split", "1"}, &good, &error);
  CHECK(!good && contains(error, "below 1"));
  CHECK(parse({"--help"}, &good, &error).help && good);
  CHECK(contains(usage(), "--save-every"));
}

TEST("a run that is cut anywhere and resumed ends in the same checkpoint, byte for byte") {
  for (const uint32_t accumulation : {1u, 3u}) {
    Workspace straight(mean_program(accumulation));
    REQUIRE(train(straight.options) == 0);
    for (int64_t cut = 1; cut < 15; ++cut) {
      Workspace resumed(mean_program(accumulation));
      resumed.options.max_steps = cut;
      REQUIRE(train(resumed.options) == 0);
      resumed.options.max_steps = 0;
      resumed.options.resume = true;
      REQUIRE(train(resumed.options) == 0);
      CHECK(resumed.checkpoint() == straight.checkpoint());
    }
  }
}

TEST("the threads of a run do not change its result") {
  Workspace one, two;
  two.options.threads = 2;
  REQUIRE(train(one.options) == 0 && train(two.options) == 0);
  CHECK(one.checkpoint() == two.checkpoint());
}

TEST("resuming without a checkpoint, with other data or another seed is refused") {
  Workspace workspace;
  workspace.options.resume = true;
  CHECK(train(workspace.options) == 1);
  CHECK(contains(pk_last_error(), "no checkpoint"));
  workspace.options.resume = false;
  workspace.options.max_steps = 2;
  REQUIRE(train(workspace.options) == 0);
  workspace.options.resume = true;
  workspace.options.seed_given = true;
  workspace.options.seed = 5;
  CHECK(train(workspace.options) == 1);
  CHECK(contains(pk_last_error(), "--seed 0"));
  workspace.options.seed_given = false;
  workspace.write_samples("train.npz", std::vector<float>(32), std::vector<int64_t>(8));
  CHECK(train(workspace.options) == 1);
  CHECK(contains(pk_last_error(), "11 samples"));
}

TEST("NaN in the data or in the loss ends the run and keeps the last good checkpoint") {
  Workspace workspace;
  REQUIRE(train(workspace.options) == 0);
  const std::string before = workspace.checkpoint();
  std::vector<float> x(16, 1.0f);
  x[6] = __builtin_nanf("");
  workspace.write_samples("train.npz", x, {0, 1, 2, 3});
  CHECK(train(workspace.options) == 1);
  CHECK(contains(pk_last_error(), "`pixel_values` holds NaN in sample 1"));
  CHECK(workspace.checkpoint() == before);
  workspace.write_samples("train.npz", std::vector<float>(16, 1e30f), {0, 1, 2, 3});
  CHECK(train(workspace.options) == 1);
  CHECK(contains(pk_last_error(), "the loss became infinite in step 1 of epoch 1"));
  CHECK(workspace.checkpoint() == before);
}

TEST("less than a batch of samples is refused for training and accepted for evaluation") {
  Workspace workspace(mean_program(), 1);
  CHECK(train(workspace.options) == 1);
  CHECK(contains(pk_last_error(), "less than one batch of 2"));
  CHECK(evaluate(workspace.options) == 0);
}

TEST("a path that cannot be written is refused before training, and the probe leaves nothing") {
  Workspace workspace;
  const size_t files = workspace.directory.list().size();
  workspace.options.save = workspace.directory.path("no/such/folder/a.ckpt");
  workspace.options.epochs = 1000000000;  // would not end
  CHECK(train(workspace.options) == 1);
  CHECK(contains(pk_last_error(), "No such file or directory"));
  CHECK(workspace.directory.list().size() == files);
}

TEST("a learning rate can be set, and nothing is learned with zero") {
  Workspace workspace;
  workspace.options.learning_rate = 0;
  REQUIRE(train(workspace.options) == 0);
  const std::string bytes = workspace.checkpoint();
  SafetensorsFile file;
  REQUIRE(read_safetensors("a", Bytes{reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}, &file) ==
          PK_OK);
  CHECK(file.find("weight")->type.as<float>()[2] == 3.0f);
  CHECK(file.find("pockc.step")->type.as<int64_t>()[0] == 15);
}

TEST("evaluation counts every sample once, and reports it") {
  // weights 1 2 3 4: the largest of x * w.
  Workspace workspace;
  const std::vector<float> x = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0};
  workspace.write_samples("test.npz", x, {0, 1, 3});
  workspace.options.data = workspace.directory.path("test.npz");
  workspace.options.json = workspace.directory.path("report.json");
  REQUIRE(evaluate(workspace.options) == 0);
  const std::string text = read_file(workspace.options.json);
  Json report;
  REQUIRE(parse_json(text.data(), text.size(), &report));
  CHECK(std::fabs(report.find("accuracy")->number - 2.0 / 3.0) < 1e-12);
  CHECK(report.find("samples")->integer == 3);
  CHECK(report.find("arena_bytes")->integer == static_cast<int64_t>(mean_program().arena_bytes));
}

TEST("training reports each epoch") {
  Workspace workspace;
  workspace.options.json = workspace.directory.path("report.json");
  workspace.options.eval = workspace.options.data;
  REQUIRE(train(workspace.options) == 0);
  const std::string text = read_file(workspace.options.json);
  Json report;
  REQUIRE(parse_json(text.data(), text.size(), &report));
  REQUIRE(report.find("epochs")->items.size() == 3);
  const Json& last = report.find("epochs")->items[2];
  CHECK(last.find("epoch")->integer == 3 && last.find("steps")->integer == 5);
  CHECK(last.find("loss")->number < report.find("epochs")->items[0].find("loss")->number);
  CHECK(last.find("accuracy")->kind == Json::Kind::kNumber && last.find("ms_per_step")->number >= 0);
  CHECK(report.find("used_peak_bytes")->integer <= report.find("arena_bytes")->integer);
}

TEST("inference writes one row per sample, in order, from the checkpoint's weights") {
  Workspace workspace;
  workspace.options.output = workspace.directory.path("out.npz");
  REQUIRE(infer(workspace.options) == 0);
  Npz given, out;
  REQUIRE(given.open(workspace.options.data) == PK_OK && out.open(workspace.options.output) == PK_OK);
  const NumpyArray* logits = out.find("logits");
  REQUIRE(logits != nullptr && logits->describe() == "float32[11,4]");
  float x, y;
  std::memcpy(&x, given.find("pixel_values")->data + 4 * (10 * 4 + 3), 4);
  std::memcpy(&y, logits->data + 4 * (10 * 4 + 3), 4);
  CHECK(y == x * 4.0f);
  REQUIRE(train(workspace.options) == 0);
  workspace.options.checkpoint = workspace.options.save;
  REQUIRE(infer(workspace.options) == 0);
  Npz tuned;
  REQUIRE(tuned.open(workspace.options.output) == PK_OK);
  float z;
  std::memcpy(&z, tuned.find("logits")->data + 4 * (10 * 4 + 3), 4);
  CHECK(z != y);
}

TEST("the self-test compares with the golden vectors") {
  for (const float expected : {14.0f, 14.1f}) {
    ProgramWriter writer = mean_program();
    const float x[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    const int64_t labels[2] = {};
    SafetensorsFile::Item a{"train_step/input/labels", {}, 16}, b{"train_step/input/pixel_values", {}, 32},
        c{"train_step/output/loss", {}, 4};
    a.type.dtype = DType::kI64;
    a.type.rank = 1;
    a.type.dims[0] = 2;
    b.type.rank = 2;
    b.type.dims[0] = 2;
    b.type.dims[1] = 4;
    writer.golden = safetensors_header({}, {a, b, c}) +
                    std::string(reinterpret_cast<const char*>(labels), 16) +
                    std::string(reinterpret_cast<const char*>(x), 32) +
                    std::string(reinterpret_cast<const char*>(&expected), 4);
    Workspace workspace(writer);
    CHECK(selftest(workspace.options) == (expected == 14.0f ? 0 : 1));
  }
  Workspace without;
  CHECK(selftest(without.options) == 1);
  CHECK(contains(pk_last_error(), "no golden vectors"));
}

TEST("a board is read from its files") {
  Workspace workspace;
  const std::string root = workspace.options.model + ".root";
  const auto put = [&root](const std::string& path, const std::string& text) {
    for (size_t at = root.size(); at != std::string::npos; at = (root + path).find('/', at + 1))
      mkdir((root + path).substr(0, at).c_str(), 0700);
    write_file(root + path, text);
  };
  CHECK(describe(read_board(root)).empty());  // nothing is there
  put("/proc/cpuinfo",
      "processor\t: 0\nFeatures\t: fp asimd evtstrm asimdhp asimddp cpuid\nModel\t\t: A board\n");
  put("/proc/device-tree/model", std::string("Raspberry Pi 5 Model B\0", 23));
  put("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1500000\n");
  put("/sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq", "2400000\n");
  put("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "ondemand\n");
  put("/sys/class/thermal/thermal_zone0/temp", "51234\n");
  put("/sys/class/thermal/thermal_zone3/temp", "61234\n");
  put("/sys/devices/platform/soc/soc:firmware/get_throttled", "50005\n");
  put("/var/lib/nvpmodel/status", "pmode:0002 fmode:fanNull\n");
  put("/etc/nvpmodel.conf", "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=MODE_15W >\n");
  const Board board = read_board(root);
  CHECK(board.throttle_flags == 0x50005);
  CHECK(
      describe(board) ==
      "board Raspberry Pi 5 Model B\nhas   asimd asimdhp asimddp\nclock 1500 MHz of 2400 (ondemand), 61.2 C\n"
      "limit too low a voltage now, throttling now\npower MODE_15W (2)\n");
  put("/sys/devices/platform/soc/soc:firmware/get_throttled", "0\n");
  CHECK(read_board(root).throttling == "none");
  put("/sys/devices/platform/soc/soc:firmware/get_throttled", "20000\n");
  CHECK(read_board(root).throttling == "a capped clock since boot");
  CHECK(std::system(("rm -r " + root).c_str()) == 0);
}

TEST("bench and info run") {
  Workspace workspace;
  workspace.options.steps = 3;
  workspace.options.json = workspace.directory.path("report.json");
  CHECK(bench(workspace.options) == 0);
  const Json report = workspace.report();
  CHECK(report.find("batch_size")->integer == 2 && report.find("samples_per_second")->number > 0);
  CHECK(report.find("planned_peak_bytes")->integer ==
        report.find("arena_bytes")->integer + report.find("mapped_bytes")->integer);
  CHECK(report.find("rss_added_peak_bytes")->integer > 0);
  CHECK(report.find("cpu_features")->kind == Json::Kind::kString);
  CHECK(report.find("cpu_load_ms")->number > 0 && report.find("cpu_first_step_ms")->number > 0);
  workspace.options.entry = "eval_step";
  CHECK(bench(workspace.options) == 0);
  workspace.options.entry = "none";
  CHECK(bench(workspace.options) == 1);
  CHECK(info(workspace.options) == 0);
  workspace.options.model = workspace.directory.path("none.pock");
  CHECK(info(workspace.options) == 1);
}

// Last, since the signal stays noted in this process.
TEST("a signal ends the run after its step, saves, and the run can be resumed exactly") {
  Workspace straight, interrupted;
  REQUIRE(train(straight.options) == 0);
  const pid_t child = fork();
  if (child == 0) {
    interrupted.options.epochs = 1000000;
    _exit(train(interrupted.options));
  }
  int status = 0;
  usleep(200 * 1000);
  kill(child, SIGTERM);
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
  REQUIRE(access(interrupted.options.save.c_str(), R_OK) == 0);
  // The same number of epochs without a stop gives the same states.
  Model model;
  REQUIRE(model.open(interrupted.options) == PK_OK);
  REQUIRE(model.session.load(interrupted.options.save.c_str()) == PK_OK);
  const std::string cursor = model.session.cursor();
  Json json;
  REQUIRE(parse_json(cursor.data(), cursor.size(), &json));
  Options again = straight.options;
  again.epochs = 1000000;
  again.max_steps = json.find("epoch")->integer * 5 + json.find("step")->integer;
  REQUIRE(again.max_steps > 0 && train(again) == 0);
  CHECK(straight.checkpoint() == interrupted.checkpoint());
}

int main() { return run_tests(); }
