// Checkpoints: exact resume, refusal of what does not fit, and a disk that fails at every point.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "check.h"
#include "crc32.h"
#include "program_writer.h"
#include "safetensors.h"
#include "session.h"
#include "session_fixture.h"

using namespace pockc;
using namespace pockc::test;

namespace {

void fill(float* x, int step) {
  for (int i = 0; i < 8; ++i) x[i] = 0.1f * static_cast<float>(i * 7 % 5) + 0.37f * static_cast<float>(step);
}

// A file system that lets `calls` calls pass and fails the next one, with `code`.
int calls_left = 0;
int error_code = 0;
bool short_writes = false;

bool refuse() {
  if (calls_left-- > 0) return false;
  errno = error_code;
  return true;
}

const FileSystem kFaulty = {
    [](const char* path, int flags, mode_t mode) { return refuse() ? -1 : ::open(path, flags, mode); },
    [](int file, const void* data, size_t size) -> ssize_t {
      if (refuse()) return -1;
      return ::write(file, data, short_writes && size > 7 ? 7 : size);
    },
    [](int file) { return refuse() ? -1 : ::fsync(file); },
    [](int file) {
      ::close(file);  // a failed close still closes
      return refuse() ? -1 : 0;
    },
    [](const char* from, const char* to) { return refuse() ? -1 : ::rename(from, to); },
    [](const char* path) { return ::unlink(path); },
    ::pread,
    ::pwrite,
    ::ftruncate,
};

struct Direct {
  explicit Direct(const TemporaryDirectory& directory) {
    write_file(directory.path("model.pock"), mean_program().bytes());
    ready = load_program(directory.path("model.pock").c_str(), &program) == PK_OK &&
            session.create(program, SessionSettings()) == PK_OK;
  }
  Program program;
  Session session;
  bool ready = false;
};

}  // namespace

TEST("ten steps straight equal five, a checkpoint, a new session and five more, to the last bit") {
  for (const uint32_t accumulation : {1u, 3u}) {
    Fixture straight(mean_program(accumulation)), first(mean_program(accumulation)),
        second(mean_program(accumulation));
    float x[8], loss_a = 0, loss_b = 0;
    for (int step = 0; step < 10; ++step) {
      fill(x, step);
      REQUIRE(straight.train(x, &loss_a) == PK_OK);
    }
    for (int step = 0; step < 5; ++step) {
      fill(x, step);
      REQUIRE(first.train(x, &loss_b) == PK_OK);
    }
    const std::string path = first.directory.path("a.ckpt");
    REQUIRE(pk_session_save(first.session, path.c_str(), "{\"step\": 5, \"note\": \"\\\"\"}") == PK_OK);
    const char* cursor = nullptr;
    REQUIRE(pk_session_load(second.session, path.c_str(), &cursor) == PK_OK);
    CHECK(std::string(cursor) == "{\"step\": 5, \"note\": \"\\\"\"}");
    for (int step = 5; step < 10; ++step) {
      fill(x, step);
      REQUIRE(second.train(x, &loss_b) == PK_OK);
    }
    float weight_a[4], weight_b[4];
    REQUIRE(straight.read("weight", weight_a, {4}) == PK_OK);
    REQUIRE(second.read("weight", weight_b, {4}) == PK_OK);
    CHECK(std::memcmp(weight_a, weight_b, sizeof(weight_a)) == 0);
    CHECK(std::memcmp(&loss_a, &loss_b, sizeof(loss_a)) == 0);
  }
}

TEST("a checkpoint holds the states in the user's layout and no frozen ones") {
  Fixture fixture;
  const std::string path = fixture.directory.path("a.ckpt");
  REQUIRE(pk_session_save(fixture.session, path.c_str(), nullptr) == PK_OK);
  const std::string bytes = read_file(path);
  SafetensorsFile file;
  REQUIRE(read_safetensors("a.ckpt", Bytes{reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()},
                           &file) == PK_OK);
  CHECK(file.items.size() == 5 && file.find("frozen") == nullptr);
  const SafetensorsFile::Item* table = file.find("table");
  REQUIRE(table != nullptr && table->type.dims[0] == 3 && table->type.dims[1] == 2);
  for (int i = 0; i < 6; ++i) CHECK(table->type.as<float>()[i] == static_cast<float>(i));
  CHECK(*file.find_metadata("format") == "pockc-checkpoint-1");
  CHECK(*file.find_metadata("cursor") == "null");
}

TEST("a checkpoint of another program is refused and changes nothing") {
  Fixture fixture;
  ProgramWriter other = mean_program();
  other.hash_seed = 2;
  Fixture stranger(other);
  const std::string path = fixture.directory.path("a.ckpt");
  float x[8] = {}, loss, weight[4];
  REQUIRE(fixture.train(x, &loss) == PK_OK);
  REQUIRE(pk_session_save(fixture.session, path.c_str(), nullptr) == PK_OK);
  CHECK(pk_session_load(stranger.session, path.c_str(), nullptr) == PK_WRONG_MODEL);
  CHECK(contains(pk_last_error(), "another program"));
  REQUIRE(stranger.read("weight", weight, {4}) == PK_OK);
  CHECK(weight[3] == 4.0f);
}

TEST("a damaged or cut off checkpoint is refused and changes nothing") {
  Fixture fixture;
  const std::string path = fixture.directory.path("a.ckpt");
  float x[8] = {}, loss, weight[4];
  REQUIRE(pk_session_save(fixture.session, path.c_str(), nullptr) == PK_OK);
  REQUIRE(fixture.train(x, &loss) == PK_OK);
  const std::string bytes = read_file(path);
  for (size_t length = 0; length < bytes.size(); ++length) {
    write_file(path, bytes.substr(0, length));
    if (pk_session_load(fixture.session, path.c_str(), nullptr) != PK_BAD_FILE) CHECK(false && "accepted");
  }
  for (size_t i = 0; i < bytes.size(); ++i) {
    std::string changed = bytes;
    changed[i] = static_cast<char>(changed[i] ^ 0x01);
    write_file(path, changed);
    // A change of the header's text may keep its meaning (the cursor's letters, padding): then the load is
    // good.
    pk_session_load(fixture.session, path.c_str(), nullptr);
  }
  write_file(path, bytes);
  REQUIRE(pk_session_load(fixture.session, path.c_str(), nullptr) == PK_OK);
  REQUIRE(fixture.read("weight", weight, {4}) == PK_OK);
  CHECK(weight[3] == 4.0f);
  // One bit of a weight.
  std::string changed = bytes;
  changed[changed.size() - 1] ^= 0x40;
  write_file(path, changed);
  REQUIRE(fixture.train(x, &loss) == PK_OK);
  CHECK(pk_session_load(fixture.session, path.c_str(), nullptr) == PK_BAD_FILE);
  REQUIRE(fixture.read("weight", weight, {4}) == PK_OK);
  CHECK(weight[3] == 3.0f);
  CHECK(pk_session_load(fixture.session, fixture.directory.path("none").c_str(), nullptr) == PK_NOT_FOUND);
}

TEST("whatever the disk refuses, the old checkpoint stays and no temporary file is left") {
  TemporaryDirectory directory;
  Direct direct(directory);
  REQUIRE(direct.ready);
  const std::string path = directory.path("a.ckpt");
  REQUIRE(direct.session.save(path.c_str(), "1") == PK_OK);
  const std::string old = read_file(path);
  direct.session.set_file_system(kFaulty);
  for (const bool with_short_writes : {false, true}) {
    short_writes = with_short_writes;
    for (const int code : {ENOSPC, EIO}) {
      int failures_seen = 0;
      for (int allowed = 0; allowed < 10000; ++allowed) {
        calls_left = allowed;
        error_code = code;
        const pk_status status = direct.session.save(path.c_str(), "2");
        if (calls_left >= 0) {
          CHECK(status == PK_OK);
          break;
        }
        const std::string now = read_file(path);
        CHECK(directory.list().size() == 2);  // the program and the checkpoint
        if (status == PK_OK) {                // only syncing the directory may be refused in silence
          CHECK(now != old);
          write_file(path, old);
          continue;
        }
        ++failures_seen;
        CHECK(status == PK_IO_ERROR);
        CHECK(contains(pk_last_error(), std::strerror(code)));
        if (contains(pk_last_error(), "directory could not be synced")) {
          CHECK(now != old);
        } else {
          CHECK(now == old);
        }
        write_file(path, old);
      }
      CHECK(failures_seen >= 5);  // open, write, fsync, close, rename
      write_file(path, old);
    }
  }
}

TEST("a directory that does not exist or a cursor that is not JSON is an error") {
  Fixture fixture;
  CHECK(pk_session_save(fixture.session, "/nonexistent/a.ckpt", nullptr) == PK_IO_ERROR);
  CHECK(contains(pk_last_error(), "No such file"));
  CHECK(pk_session_save(fixture.session, fixture.directory.path("a").c_str(), "{") == PK_INVALID_ARGUMENT);
}

int main() { return run_tests(); }
