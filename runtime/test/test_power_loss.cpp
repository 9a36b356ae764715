// Failing disks, killed processes and power cuts at every call of a save: the checkpoint from before or the
// new one is there, and training goes on from it as if nothing had been, to the last bit.
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <functional>

#include "check.h"
#include "faulty_disk.h"
#include "session.h"
#include "workspace.h"

// Freed memory is kept by the address sanitizer, and copying its page tables is what a fork costs.
extern "C" const char* __asan_default_options() { return "quarantine_size_mb=4"; }

using namespace pockc;
using namespace pockc::test;

namespace {

constexpr int kSteps = 7;  // of accumulation 3: checkpoints fall between updates of the weights too
constexpr int kOld = 2, kNew = 4;

// A program with a session over it that trains on samples of its own, and saves after given steps.
class Run {
 public:
  explicit Run(const TemporaryDirectory& directory) : path_(directory.path("a.ckpt")) {
    const std::string model = directory.path("model.pock");
    if (access(model.c_str(), R_OK) != 0) write_file(model, mean_program(3).bytes());
    ready_ = load_program(model.c_str(), &program_) == PK_OK &&
             session_.create(program_, SessionSettings()) == PK_OK;
  }

  bool ready() const { return ready_; }
  const std::string& path() const { return path_; }
  void use(const FileSystem& disk) { session_.set_file_system(disk); }

  bool train_to(int last) {
    for (; step_ < last; ++step_) {
      if (train_step() != PK_OK) return false;
    }
    return true;
  }

  Status save() { return session_.save(path_.c_str(), std::to_string(step_).c_str()); }

  Status load() {
    const Status status = session_.load(path_.c_str());
    if (status == PK_OK) step_ = std::atoi(session_.cursor().c_str());
    return status;
  }

  int step() const { return step_; }

  // All states, as the file of a checkpoint.
  std::string states(const TemporaryDirectory& directory) {
    const std::string path = directory.path("states.ckpt");
    session_.set_file_system(posix_file_system());
    if (session_.save(path.c_str(), nullptr) != PK_OK) return std::string();
    std::string bytes = read_file(path);
    unlink(path.c_str());
    return bytes;
  }

 private:
  Status train_step() {
    float x[8], loss = 0;
    for (int i = 0; i < 8; ++i)
      x[i] = 0.1f * static_cast<float>(i * 7 % 5) + 0.37f * static_cast<float>(step_);
    int64_t labels[2] = {0, 1};
    const char* names[] = {"pixel_values", "labels"};
    const pk_tensor inputs[] = {{x, PK_F32, 2, {2, 4}}, {labels, PK_I64, 1, {2}}};
    const char* output = "loss";
    const pk_tensor outputs[] = {{&loss, PK_F32, 0, {}}};
    return session_.run("train_step", names, inputs, 2, &output, outputs, 1);
  }

  std::string path_;
  Program program_;
  Session session_;
  int step_ = 0;
  bool ready_ = false;
};

// The states after all steps of a run that nothing disturbs.
std::string uninterrupted() {
  TemporaryDirectory directory;
  Run run(directory);
  return run.ready() && run.train_to(kSteps) ? run.states(directory) : std::string();
}

// Loads what lies in the directory, or starts anew where `may_be_missing`, trains to the end, with one more
// save. Whether all went well; `*loaded` is the step that it went on from.
bool resumes(const TemporaryDirectory& directory, bool may_be_missing, int* loaded) {
  static const std::string straight = uninterrupted();
  Run run(directory);
  if (!run.ready()) return false;
  const Status status = run.load();
  if (status != PK_OK && !(may_be_missing && status == PK_NOT_FOUND)) return false;
  *loaded = run.step();
  if (!run.train_to(kSteps) || run.save() != PK_OK) return false;
  return !straight.empty() && run.states(directory) == straight && directory.list().size() == 2;
}

// Runs `body` in a process of its own; its exit status, or -1.
int in_child(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return -1;
  return WEXITSTATUS(status);
}

// Trains, saves at kOld on a good disk where `has_old`, then at kNew on the faulty one.
struct Saved {
  explicit Saved(bool has_old) : run(directory) {
    ready = run.ready() && run.train_to(kOld) && (!has_old || run.save() == PK_OK) && run.train_to(kNew);
  }
  TemporaryDirectory directory;
  Run run;
  bool ready = false;
};

// The calls of one save.
int64_t count_calls() {
  Saved saved(true);
  saved.run.use(faulty_disk());
  set_fault(Fault::kNone, 0, 0);
  return saved.ready && saved.run.save() == PK_OK ? calls_seen() : 0;
}

}  // namespace

TEST("a process that dies before, in or after any call of a save leaves a checkpoint that resumes exactly") {
  const int64_t calls = count_calls();
  CHECK(calls >=
        13);  // open, header and five states, fsync, close, rename; open, fsync, close of the directory
  for (const bool has_old : {true, false}) {
    int seen_old = 0, seen_new = 0;
    for (const Fault fault : {Fault::kDieBefore, Fault::kDieHalf, Fault::kDieAfter}) {
      for (int64_t at = 0; at < calls; ++at) {
        Saved saved(has_old);
        REQUIRE(saved.ready);
        saved.run.use(faulty_disk());
        REQUIRE(in_child([&] {
                  set_fault(fault, at, 0);
                  return saved.run.save() == PK_OK ? 0 : 1;
                }) == kDied);
        int loaded = -1;
        CHECK(resumes(saved.directory, !has_old, &loaded));
        CHECK(loaded == kNew || loaded == (has_old ? kOld : 0));
        seen_old += loaded == kNew ? 0 : 1;
        seen_new += loaded == kNew ? 1 : 0;
      }
    }
    CHECK(seen_old > 0 && seen_new > 0);
  }
}

TEST("a call of a save that fails costs nothing: the run goes on, and so does one from the disk") {
  const int64_t calls = count_calls();
  for (const int code : {ENOSPC, EIO}) {
    for (const Fault fault : {Fault::kFail, Fault::kFailHalf, Fault::kStayBroken}) {
      for (int64_t at = 0; at < calls; ++at) {
        Saved saved(true);
        REQUIRE(saved.ready);
        saved.run.use(faulty_disk());
        set_fault(fault, at, code);
        const Status status = saved.run.save();
        CHECK(calls_seen() > at);
        // What cannot be saved must be said; opening and closing the directory may fail in silence.
        CHECK(status == PK_IO_ERROR || (status == PK_OK && at >= calls - 3));
        saved.run.use(posix_file_system());
        int loaded = -1;
        // Before the running process saves again: what somebody else finds.
        TemporaryDirectory other;
        write_file(other.path("a.ckpt"), read_file(saved.run.path()));
        CHECK(resumes(other, false, &loaded));
        CHECK(loaded == kOld || loaded == kNew);
        CHECK(status != PK_OK || loaded == kNew);
        // The process itself.
        CHECK(saved.run.train_to(kSteps - 1) && saved.run.save() == PK_OK);
        CHECK(resumes(saved.directory, false, &loaded) && loaded == kSteps - 1);
      }
    }
  }
}

namespace {

struct Cuts {
  int refused = 0, old = 0, fresh = 0, lost_after_return = 0, wrong = 0;
};

// Lays out everything that a power cut after each call of a save may leave, and resumes from it.
Cuts cut_power_everywhere(const DiskOptions& options) {
  Cuts cuts;
  Saved saved(true);
  const std::string before = read_file(saved.run.path());
  saved.run.use(recording_disk());
  start_recording();
  if (!saved.ready || saved.run.save() != PK_OK) return Cuts{-1, -1, -1, -1, -1};
  const std::vector<DiskCall>& calls = recorded_calls();
  for (size_t count = 0; count <= calls.size(); ++count) {
    for (const std::string& contents : contents_after_power_cut(calls, count, before, options)) {
      TemporaryDirectory directory;
      write_file(directory.path("a.ckpt"), contents);
      {
        Run run(directory);
        const Status status = contents.empty() ? PK_BAD_FILE : run.load();
        cuts.refused += status == PK_BAD_FILE ? 1 : 0;
        cuts.wrong += status == PK_OK || status == PK_BAD_FILE ? 0 : 1;
        if (status != PK_OK) continue;
      }
      int loaded = -1;
      cuts.wrong += resumes(directory, false, &loaded) && (loaded == kOld || loaded == kNew) ? 0 : 1;
      cuts.old += loaded == kOld ? 1 : 0;
      cuts.fresh += loaded == kNew ? 1 : 0;
      cuts.lost_after_return += count == calls.size() && loaded != kNew ? 1 : 0;
    }
  }
  return cuts;
}

}  // namespace

TEST(
    "a power cut after any call leaves the old or the new checkpoint, and the new one once save has "
    "returned") {
  const Cuts cuts = cut_power_everywhere(DiskOptions());
  CHECK(cuts.wrong == 0 && cuts.refused == 0);
  CHECK(cuts.old > 0 && cuts.fresh > 0);
  CHECK(cuts.lost_after_return == 0);
}

// What the test above would say if save left a call out.
TEST("without syncs the same cuts do harm, and what is torn is refused instead of loaded") {
  DiskOptions no_data;
  no_data.syncs_data = false;
  const Cuts torn = cut_power_everywhere(no_data);
  CHECK(torn.refused > 100 && torn.wrong == 0);
  DiskOptions no_directories;
  no_directories.syncs_directories = false;
  const Cuts forgotten = cut_power_everywhere(no_directories);
  CHECK(forgotten.lost_after_return > 0 && forgotten.refused == 0 && forgotten.wrong == 0);
}

TEST("pock-run train that is killed at any call of its saves, then resumed, ends in the same file") {
  const auto prepare = [](Workspace* workspace) {
    workspace->options.epochs = 2;
    workspace->options.save_every = 1;
    workspace->options.file_system = &faulty_disk();
  };
  Workspace straight(mean_program(3), 7);  // three batches of two
  prepare(&straight);
  set_fault(Fault::kNone, 0, 0);
  REQUIRE(cli::train(straight.options) == 0);
  const std::string wanted = read_file(straight.options.save);
  const int64_t calls = calls_seen();
  CHECK(calls >= 6 * 13);
  for (int64_t at = 0; at < calls; ++at) {
    Workspace killed(mean_program(3), 7);
    prepare(&killed);
    REQUIRE(in_child([&] {
              set_fault(Fault::kDieHalf, at, 0);
              return cli::train(killed.options);
            }) == kDied);
    killed.options.file_system = &posix_file_system();
    killed.options.resume = access(killed.options.save.c_str(), R_OK) == 0;
    REQUIRE(cli::train(killed.options) == 0);
    CHECK(read_file(killed.options.save) == wanted);
    CHECK(killed.directory.list().size() == 3);
  }
}

int main() { return run_tests(); }
