// The reader of checkpoints, and training from what it accepts.
#include <cstring>

#include "crc32.h"
#include "fuzz.h"
#include "program_writer.h"
#include "session.h"

namespace pockc::fuzz {
namespace {

// One program and session for all inputs: a checkpoint replaces every state, or nothing.
struct Host {
  Host() : file(bytes(), size()) {
    program.file.borrow(file.data(), file.size());
    if (read_program("model.pock", &program) != PK_OK) __builtin_trap();
    if (session.create(program, SessionSettings()) != PK_OK) __builtin_trap();
  }
  static const std::string& text() {
    static const std::string text = test::mean_program(3).bytes();
    return text;
  }
  static const uint8_t* bytes() { return reinterpret_cast<const uint8_t*>(text().data()); }
  static size_t size() { return text().size(); }

  PageCopy file;
  Program program;
  Session session;
};

Host& host() {
  static Host only;
  return only;
}

void train_step(Session* session) {
  float x[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  int64_t labels[2] = {0, 1};
  const char* names[] = {"pixel_values", "labels"};
  const pk_tensor inputs[] = {{x, PK_F32, 2, {2, 4}}, {labels, PK_I64, 1, {2}}};
  session->run("train_step", names, inputs, 2, nullptr, nullptr, 0);
}

void load(Bytes bytes) {
  if (host().session.load_bytes("a.ckpt", bytes) == PK_OK) train_step(&host().session);
}

// The same file with the right length of its header and the right sum in it.
std::string repair(const uint8_t* data, size_t size) {
  std::string file(reinterpret_cast<const char*>(data), size);
  static const char kKey[] = "\"crc32\":\"";
  const size_t key = file.find(kKey);
  const size_t end = file.find('}', file.rfind("\"data_offsets\""));
  if (size < 8 || key == std::string::npos || end == std::string::npos) return file;
  size_t begin = file.find('}', end + 1);
  if (begin == std::string::npos) return file;
  for (++begin; begin < file.size() && file[begin] == ' ';) ++begin;
  const std::string sum = std::to_string(crc32(0, file.data() + begin, file.size() - begin));
  size_t digits = key + sizeof(kKey) - 1, count = 0;
  while (digits + count < begin && file[digits + count] >= '0' && file[digits + count] <= '9') ++count;
  file.replace(digits, count, sum);
  put<uint64_t>(reinterpret_cast<uint8_t*>(&file[0]), begin + sum.size() - count - 8);
  return file;
}

}  // namespace

std::vector<std::string> fuzz_seeds() {
  test::TemporaryDirectory directory;
  const std::string path = directory.path("a.ckpt");
  std::vector<std::string> seeds;
  Session session;
  if (session.create(host().program, SessionSettings()) != PK_OK) return seeds;
  for (const char* cursor : {"null", "{\"epoch\": 1, \"step\": [2, -3.5e2, true, \"\\u00e9\"]}"}) {
    train_step(&session);
    if (session.save(path.c_str(), cursor) == PK_OK) seeds.push_back(test::read_file(path));
  }
  return seeds;
}

Focus fuzz_focus(const std::string& input) {
  const size_t end = input.rfind('}');
  return Focus{0, end == std::string::npos ? input.size() : end + 1};
}

}  // namespace pockc::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  pockc::fuzz::PageCopy file(data, size);
  pockc::fuzz::load(file.bytes());
  const std::string repaired = pockc::fuzz::repair(data, size);
  pockc::fuzz::PageCopy second(reinterpret_cast<const uint8_t*>(repaired.data()), repaired.size());
  pockc::fuzz::load(second.bytes());
  return 0;
}
