// The cache of the frozen prefix: whatever becomes of its file, training ends in the same checkpoint as
// without.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>

#include "check.h"
#include "faulty_disk.h"
#include "record_format.h"
#include "workspace.h"

using namespace pockc;
using namespace pockc::test;

namespace {

constexpr int64_t kSamples = 7;  // three batches of two
constexpr uint64_t kHead = 128;  // of a file with as many samples: header and table
constexpr uint64_t kRecord = 16;

// `mean_program` behind a frozen layer, which multiplies each input by a constant; `frozen` changes it.
ProgramWriter cached_program(uint32_t accumulation = 1, float frozen = 2) {
  ProgramWriter writer = mean_program(accumulation);
  const float factor[4] = {frozen, 1, 0.5f, 3};
  const uint32_t constant = writer.constant(DType::kF32, {4}, factor);
  const uint32_t x = writer.entries[0].inputs[0].tensor;
  const uint32_t encoded = writer.transient(DType::kF32, {2, 4});
  const WrittenCall layer = writer.call("mul", {x, constant}, {encoded});
  const size_t count = writer.entries.size();
  for (size_t i = 0; i < count; ++i) {
    if (writer.entries[i].name == "infer" || writer.entries[i].name == "eval_step") continue;
    WrittenEntry behind = writer.entries[i];
    behind.name += "_encoded";
    behind.inputs[0] = {"encoded.0", encoded};
    behind.calls[0].inputs[1] = encoded;
    writer.entries[i].calls = behind.calls;
    writer.entries[i].calls.insert(writer.entries[i].calls.begin(), layer);
    writer.entries.push_back(behind);
  }
  writer.entries.push_back({"encode", {{"pixel_values", x}}, {{"encoded.0", encoded}}, {layer}});
  return writer;
}

struct CachedRun : Workspace {
  explicit CachedRun(const ProgramWriter& writer = cached_program()) : Workspace(writer, kSamples) {
    options.json = directory.path("report.json");
    options.cache_prefix = directory.path("");  // the directory itself
  }
  std::string cache() const { return directory.path("train.cache"); }
  int64_t count(const char* what) const { return report().find(what)->integer; }
};

// The checkpoint of a run without a cache.
std::string uncached(const ProgramWriter& writer = cached_program()) {
  CachedRun run(writer);
  run.options.cache_prefix.clear();
  return cli::train(run.options) == 0 ? run.checkpoint() : std::string();
}

// Trains again over what is in the cache; whether that ends in `wanted`.
bool trains_to(CachedRun* run, const std::string& wanted) {
  unlink(run->options.save.c_str());
  return cli::train(run->options) == 0 && run->checkpoint() == wanted;
}

}  // namespace

TEST("a run with a cache ends in the same checkpoint, and encodes each sample once, ever") {
  for (const uint32_t accumulation : {1u, 3u}) {
    CachedRun run(cached_program(accumulation));
    const std::string wanted = uncached(cached_program(accumulation));
    REQUIRE(!wanted.empty());
    CHECK(trains_to(&run, wanted));
    CHECK(run.count("cache_encoded_samples") == kSamples && run.count("cache_read_samples") > 0);
    CHECK(read_file(run.cache()).size() == kHead + kSamples * kRecord);
    CHECK(trains_to(&run, wanted));
    CHECK(run.count("cache_encoded_samples") == 0 && run.count("cache_written_bytes") == 0);
  }
}

TEST("within a limit some samples are kept, and no more of the others are encoded at a time than needed") {
  const std::string wanted = uncached();
  for (uint64_t slots = 0; slots <= kSamples; ++slots) {
    CachedRun run;
    run.options.cache_bytes = kHead + slots * kRecord + kRecord - 1;
    CHECK(trains_to(&run, wanted));
    struct stat information = {};
    CHECK((stat(run.cache().c_str(), &information) == 0) == (slots > 0));
    CHECK(static_cast<uint64_t>(information.st_size) <= run.options.cache_bytes);
    // Each epoch leaves one sample out.
    CHECK(run.count("cache_encoded_samples") <= static_cast<int64_t>(slots + 3 * (kSamples - slots)));
    run.options.cache_bytes = kHead + kRecord;  // a smaller limit shortens the file
    CHECK(trains_to(&run, wanted));
    CHECK(read_file(run.cache()).size() <= run.options.cache_bytes);
  }
}

TEST("a cache that is cut off anywhere, or has any byte changed, changes no result") {
  const std::string wanted = uncached();
  CachedRun run;
  REQUIRE(trains_to(&run, wanted));
  const std::string good = read_file(run.cache());
  for (size_t size = 0; size < good.size(); ++size) {
    write_file(run.cache(), good.substr(0, size));
    CHECK(trains_to(&run, wanted));
    CHECK(read_file(run.cache()).size() <= good.size());
  }
  int64_t encoded = 0;
  for (size_t at = 0; at < good.size(); ++at) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ (1 << at % 8));
    write_file(run.cache(), bad);
    CHECK(trains_to(&run, wanted));
    encoded += run.count("cache_encoded_samples");
  }
  CHECK(encoded > static_cast<int64_t>(good.size() - kHead));  // what is changed is noticed
  // A slot in the place of another: each is whole, and of the wrong sample.
  std::string swapped = good;
  for (size_t i = 0; i < kRecord; ++i) std::swap(swapped[kHead + i], swapped[kHead + kRecord + i]);
  for (size_t i = 64; i < 68; ++i) std::swap(swapped[i], swapped[i + 4]);
  write_file(run.cache(), swapped);
  CHECK(trains_to(&run, wanted));
  CHECK(run.count("cache_encoded_samples") == 2);
}

TEST("other weights or other data: the cache is made anew") {
  CachedRun run;
  REQUIRE(trains_to(&run, uncached()));
  const std::string old = read_file(run.cache());
  const ProgramWriter other = cached_program(1, 2.5f);
  write_file(run.options.model, other.bytes());
  CHECK(trains_to(&run, uncached(other)));
  CHECK(run.count("cache_encoded_samples") == kSamples);
  // Should a power cut bring back what was behind its header, that would still not be believed.
  std::string mixed = read_file(run.cache());
  mixed.replace(64, std::string::npos, old.substr(64));
  write_file(run.cache(), mixed);
  CHECK(trains_to(&run, uncached(other)));
  CHECK(run.count("cache_encoded_samples") == kSamples);
  run.write_samples("train.npz", std::vector<float>(4 * kSamples, 0.5f), std::vector<int64_t>(kSamples, 1));
  REQUIRE(cli::train(run.options) == 0);
  CHECK(run.count("cache_encoded_samples") == kSamples);
}

TEST("a process that dies at any call of its files leaves a cache that the next run trains from exactly") {
  const std::string wanted = uncached();
  CachedRun straight;
  straight.options.file_system = &faulty_disk();
  set_fault(Fault::kNone, 0, 0);
  REQUIRE(trains_to(&straight, wanted));
  const int64_t calls = calls_seen();
  CHECK(calls > 30);
  for (int64_t at = 0; at < calls; ++at) {
    CachedRun killed;
    killed.options.file_system = &faulty_disk();
    const pid_t child = fork();
    if (child == 0) {
      set_fault(Fault::kDieHalf, at, 0);
      _exit(cli::train(killed.options));
    }
    int status = 0;
    REQUIRE(child > 0 && waitpid(child, &status, 0) == child && WEXITSTATUS(status) == kDied);
    killed.options.file_system = &posix_file_system();
    killed.options.resume = access(killed.options.save.c_str(), R_OK) == 0;
    REQUIRE(cli::train(killed.options) == 0);
    CHECK(killed.checkpoint() == wanted);
  }
}

TEST("a card that becomes full or unreadable ends no run") {
  const std::string wanted = uncached();
  CachedRun start;
  start.options.save.clear();
  start.options.file_system = &faulty_disk();
  start.options.max_steps = 1;
  set_fault(Fault::kNone, 0, 0);
  REQUIRE(cli::train(start.options) == 0);
  const int64_t calls = calls_seen();
  for (const int code : {ENOSPC, EIO}) {
    for (int64_t at = 4; at < calls; ++at) {  // behind those that open the file and write its header
      CachedRun run;
      run.options.file_system = &faulty_disk();
      set_fault(Fault::kFailHalf, at, code);
      CHECK(trains_to(&run, wanted));
      run.options.file_system = &posix_file_system();
      CHECK(trains_to(&run, wanted));
    }
  }
}

TEST("what cannot be a cache is refused before training, and nothing outside the directory is touched") {
  CachedRun run;
  const std::string outside = run.directory.path("precious");
  write_file(outside, "text");
  REQUIRE(symlink(outside.c_str(), run.cache().c_str()) == 0);
  CHECK(cli::train(run.options) == 1);
  CHECK(read_file(outside) == "text");
  unlink(run.cache().c_str());
  REQUIRE(mkfifo(run.cache().c_str(), 0600) == 0);
  CHECK(cli::train(run.options) == 1);
  unlink(run.cache().c_str());
  const int other = open(run.cache().c_str(), O_RDWR | O_CREAT, 0600);
  REQUIRE(flock(other, LOCK_EX) == 0);
  CHECK(cli::train(run.options) == 1);
  CHECK(std::strstr(pk_last_error(), "in use by another run") != nullptr);
  close(other);
  CHECK(cli::train(run.options) == 0);
  run.options.cache_prefix = outside;
  CHECK(cli::train(run.options) == 1);
  CachedRun plain(mean_program());
  CHECK(cli::train(plain.options) == 1);
  CHECK(std::strstr(pk_last_error(), "build it with --cache-prefix") != nullptr);
}

TEST("a hostile program, whose entries do not fit together, is refused") {
  ProgramWriter smaller = cached_program();
  for (WrittenEntry& entry : smaller.entries) {
    if (entry.name == "train_step_encoded") entry.inputs[0].tensor = entry.calls[2].outputs[0];  // f32[1,4]
  }
  CachedRun mixed(smaller);
  CHECK(cli::train(mixed.options) == 1);
  CHECK(std::strstr(pk_last_error(), "has no array `encoded.0`") != nullptr);
  ProgramWriter writer = cached_program();
  writer.entries.back().calls[0].inputs[1] = writer.states[0].tensor;  // `weight`, which training changes
  CachedRun run(writer);
  CHECK(cli::train(run.options) == 1);
  CHECK(std::strstr(pk_last_error(), "reads what training changes") != nullptr);
}

TEST("half precision rounds to the nearest, to even, and keeps every half") {
  for (uint32_t half = 0; half < 0x7C00; ++half) {
    const float value = cli::float_of(static_cast<uint16_t>(half));
    CHECK(cli::half_of(value) == half);
    CHECK(cli::half_of(-value) == (half | 0x8000));
    if (half == 0x7BFF) continue;
    const float next = cli::float_of(static_cast<uint16_t>(half + 1)), middle = (value + next) / 2;
    CHECK(cli::half_of(middle) == half + (half & 1));
    CHECK(cli::half_of(std::nextafter(middle, next)) == half + 1);
    CHECK(cli::half_of(std::nextafter(middle, value)) == half);
  }
  CHECK(cli::half_of(1e30f) == 0x7BFF && cli::half_of(-INFINITY) == 0xFBFF);
  CHECK(std::isnan(cli::float_of(cli::half_of(NAN))));
}

TEST("in int8 no value is off by more than half a step of its block's largest") {
  float values[300], back[300];
  for (int i = 0; i < 300; ++i) values[i] = std::sin(static_cast<float>(i)) * (i < 128 ? 100.0f : 0.01f);
  for (int i = 128; i < 256; ++i) values[i] = 0.0f;
  uint8_t record[400];
  REQUIRE(cli::stored_bytes(cli::CacheDType::kInt8, DType::kF32, 300) == 312);
  cli::store(cli::CacheDType::kInt8, DType::kF32, 300, values, record);
  cli::restore(cli::CacheDType::kInt8, DType::kF32, 300, record, back);
  for (int i = 0; i < 300; ++i) {
    const float most = i < 128 ? 100.0f : i < 256 ? 0.0f : 0.01f;
    CHECK(std::fabs(back[i] - values[i]) <= most / 254 * 1.0001f);
  }
}

int main() { return run_tests(); }
