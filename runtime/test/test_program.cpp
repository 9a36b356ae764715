// The reader against files that are whole, cut off, or hostile: a status always, a crash never.
#include <cstring>
#include <random>

#include "check.h"
#include "crc32.h"
#include "json.h"
#include "program_writer.h"
#include "session.h"

using namespace pockc;
using namespace pockc::test;

namespace {

pk_status load(const std::string& path) {
  pk_program* program = nullptr;
  const pk_status status = pk_program_load(path.c_str(), &program);
  pk_program_free(program);
  return status;
}

pk_status load_bytes(const TemporaryDirectory& directory, const std::string& bytes) {
  write_file(directory.path("a.pock"), bytes);
  return load(directory.path("a.pock"));
}

// Loads, and when the file is accepted also runs every entry once: garbage in, any status out.
void load_and_run(const TemporaryDirectory& directory, const std::string& bytes) {
  write_file(directory.path("a.pock"), bytes);
  Program program;
  if (load_program(directory.path("a.pock").c_str(), &program) != PK_OK) return;
  if (program.arena_bytes > (1u << 24)) return;
  Session session;
  if (session.create(program, SessionSettings()) != PK_OK) return;
  for (const EntryRecord& entry : program.entries) {
    std::vector<const char*> names;
    std::vector<pk_tensor> tensors;
    std::vector<std::vector<char>> contents(entry.inputs.size());
    for (size_t i = 0; i < entry.inputs.size(); ++i) {
      const TensorRecord& tensor = program.tensors[entry.inputs[i].tensor];
      contents[i].resize(tensor.bytes, 1);
      pk_tensor given{contents[i].data(), static_cast<pk_dtype>(tensor.type.dtype), tensor.type.rank, {}};
      std::memcpy(given.dims, tensor.type.dims, sizeof(given.dims));
      names.push_back(entry.inputs[i].name.c_str());
      tensors.push_back(given);
    }
    session.run(entry.name.c_str(), names.data(), tensors.data(), static_cast<int32_t>(tensors.size()),
                nullptr, nullptr, 0);
  }
}

}  // namespace

TEST("a program that was written can be read") {
  TemporaryDirectory directory;
  const ProgramWriter writer = mean_program();
  write_file(directory.path("a.pock"), writer.bytes());
  pk_program* program = nullptr;
  REQUIRE(pk_program_load(directory.path("a.pock").c_str(), &program) == PK_OK);
  CHECK(std::string(pk_program_metadata(program)) == "{\"model\": \"test\"}");
  const char* name = nullptr;
  pk_tensor type;
  CHECK(pk_program_tensor(program, "train_step", PK_INPUT, 1, &name, &type) == PK_OK);
  CHECK(std::string(name) == "labels" && type.dtype == PK_I64 && type.rank == 1 && type.dims[0] == 2);
  CHECK(pk_program_tensor(program, "train_step", PK_INPUT, 2, &name, &type) == PK_NOT_FOUND);
  CHECK(pk_program_tensor(program, "nothing", PK_INPUT, 0, &name, &type) == PK_NOT_FOUND);
  // A permuted state shows the user's shape.
  CHECK(pk_program_tensor(program, nullptr, PK_STATE, 1, &name, &type) == PK_OK);
  CHECK(std::string(name) == "table" && type.dims[0] == 3 && type.dims[1] == 2);
  pk_program_free(program);
}

TEST("a file cut off at any length is refused") {
  TemporaryDirectory directory;
  const std::string bytes = mean_program().bytes();
  for (size_t length = 0; length < bytes.size(); ++length) {
    const pk_status status = load_bytes(directory, bytes.substr(0, length));
    if (status != PK_BAD_FILE) CHECK(status == PK_BAD_FILE);
  }
  CHECK(load_bytes(directory, bytes + "x") == PK_BAD_FILE);
  CHECK(contains(pk_last_error(), "too long"));
  CHECK(load_bytes(directory, bytes.substr(0, bytes.size() - 1)) == PK_BAD_FILE);
  CHECK(contains(pk_last_error(), "truncated"));
}

TEST("a changed byte in anything that is used is refused") {
  TemporaryDirectory directory;
  const std::string bytes = mean_program().bytes();
  const size_t sections_end = 64 + 3 * 24;
  for (size_t i = 0; i < bytes.size(); ++i) {
    const bool is_hash = i >= 32 && i < 64;
    const bool is_padding = i >= sections_end && bytes[i] == 0;  // or a zero that the checksum covers
    if (is_hash || is_padding) continue;
    std::string changed = bytes;
    changed[i] = static_cast<char>(changed[i] ^ 0x10);
    if (load_bytes(directory, changed) != PK_BAD_FILE) CHECK(false && "a changed byte was accepted");
  }
}

TEST("a missing file and a directory are told apart from a corrupt file") {
  TemporaryDirectory directory;
  CHECK(load(directory.path("nothing.pock")) == PK_NOT_FOUND);
  CHECK(contains(pk_last_error(), "nothing.pock"));
  CHECK(load(directory.path("")) == PK_BAD_FILE);
}

TEST("another version is named in the message") {
  TemporaryDirectory directory;
  std::string bytes = mean_program().bytes();
  bytes[8] = 4;
  const uint32_t crc = crc32(0, bytes.data(), 28);
  std::memcpy(&bytes[28], &crc, 4);
  CHECK(load_bytes(directory, bytes) == PK_BAD_FILE);
  CHECK(contains(pk_last_error(), "has format version 4"));
}

TEST("corrupt programs with right checksums never crash the reader or a kernel") {
  TemporaryDirectory directory;
  const ProgramWriter writer = mean_program();
  const std::string section = writer.program_section();
  // Every byte with a few values that are likely to hurt.
  for (size_t i = 0; i < section.size(); ++i) {
    for (const int value : {0, 1, 2, 0x7F, 0x80, 0xFF}) {
      std::string changed = section;
      changed[i] = static_cast<char>(value);
      load_and_run(directory, make_file(writer.metadata, changed, writer.data, "", 1));
    }
  }
  // The section cut off at every length.
  for (size_t length = 0; length < section.size(); ++length) {
    write_file(directory.path("a.pock"), make_file("", section.substr(0, length), writer.data, "", 1));
    const pk_status status = load(directory.path("a.pock"));
    if (status != PK_BAD_FILE) CHECK(status == PK_BAD_FILE);
  }
  // Several bytes at once.
  std::mt19937 random(7);
  for (int round = 0; round < 3000; ++round) {
    std::string changed = section;
    for (unsigned k = 0; k < 1 + random() % 4; ++k)
      changed[random() % changed.size()] = static_cast<char>(random());
    load_and_run(directory, make_file(writer.metadata, changed, writer.data, "", 1));
  }
}

TEST("operands that overlap without being the same buffer are refused") {
  TemporaryDirectory directory;
  ProgramWriter writer = mean_program();
  const uint32_t x = writer.transient(DType::kF32, {32});
  const uint32_t y = writer.transient(DType::kF32, {32});
  writer.tensors[y].offset = writer.tensors[x].offset + 64;
  writer.entries[2].calls.push_back(writer.call("neg", {x}, {y}));
  CHECK(load_bytes(directory, writer.bytes()) == PK_BAD_FILE);
  CHECK(contains(pk_last_error(), "overlaps an input"));
}

TEST("an op that writes over its own indices is refused") {
  TemporaryDirectory directory;
  ProgramWriter writer = mean_program();
  const uint32_t table = writer.transient(DType::kI32, {4});
  const uint32_t indices = writer.transient(DType::kI32, {4});
  writer.entries[2].calls.push_back(writer.call("take", {table, indices}, {indices}, {0}));
  CHECK(load_bytes(directory, writer.bytes()) == PK_BAD_FILE);
}

TEST("a gate that something else than one bool opens is refused") {
  TemporaryDirectory directory;
  for (const DType dtype : {DType::kF32, DType::kU8, DType::kI64}) {
    ProgramWriter writer = mean_program();
    const uint32_t flag = writer.transient(dtype, {}), one = writer.transient(DType::kF32, {});
    writer.entries[0].calls.push_back(writer.call("gate", {flag}, {one}));
    write_file(directory.path("a.pock"), writer.bytes());
    Program program;
    REQUIRE(load_program(directory.path("a.pock").c_str(), &program) == PK_OK);
    Session session;
    CHECK(session.create(program, SessionSettings()) == PK_BAD_FILE);
    CHECK(contains(pk_last_error(), "op `gate`"));
  }
}

TEST("an output in the data section is refused") {
  TemporaryDirectory directory;
  ProgramWriter writer = mean_program();
  const float zeros[8] = {};
  const uint32_t constant = writer.constant(DType::kF32, {8}, zeros);
  const uint32_t x = writer.transient(DType::kF32, {8});
  writer.entries[2].calls.push_back(writer.call("copy", {x}, {constant}));
  CHECK(load_bytes(directory, writer.bytes()) == PK_BAD_FILE);
  CHECK(contains(pk_last_error(), "not in the arena"));
}

TEST("a mutable state outside the states' part of the arena is refused") {
  TemporaryDirectory directory;
  ProgramWriter writer = mean_program();
  writer.state_bytes = 64;
  CHECK(load_bytes(directory, writer.bytes()) == PK_BAD_FILE);
}

TEST("arguments and states in 16 bits are refused: no caller could pass them") {
  TemporaryDirectory directory;
  ProgramWriter with_input = mean_program();
  with_input.tensors[with_input.entries[0].inputs[0].tensor].type.dtype = DType::kB16;
  CHECK(load_bytes(directory, with_input.bytes()) == PK_BAD_FILE);
  CHECK(contains(pk_last_error(), "argument") && contains(pk_last_error(), "16 bits"));
  ProgramWriter with_state = mean_program();
  with_state.tensors[with_state.states[0].tensor].type.dtype = DType::kF16;
  CHECK(load_bytes(directory, with_state.bytes()) == PK_BAD_FILE);
  CHECK(contains(pk_last_error(), "state") && contains(pk_last_error(), "16 bits"));
}

TEST("an op that the runtime lacks is named with its origin") {
  TemporaryDirectory directory;
  ProgramWriter writer = mean_program();
  const uint32_t x = writer.transient(DType::kF32, {8});
  writer.entries[2].calls.push_back(writer.call("fold_protein", {x}, {x}));
  write_file(directory.path("a.pock"), writer.bytes());
  pk_program* program = nullptr;
  REQUIRE(pk_program_load(directory.path("a.pock").c_str(), &program) == PK_OK);
  pk_session* session = nullptr;
  CHECK(pk_session_create(program, nullptr, &session) == PK_UNSUPPORTED);
  CHECK(session == nullptr);
  CHECK(contains(pk_last_error(), "fold_protein") && contains(pk_last_error(), "model.py:7"));
  pk_program_free(program);
}

TEST("an arena that cannot be had is a status") {
  TemporaryDirectory directory;
  ProgramWriter writer = mean_program();
  writer.arena_bytes = (1ull << 40) + 64;
  CHECK(load_bytes(directory, writer.bytes()) == PK_BAD_FILE);
}

TEST("checksums are those of zlib") {
  CHECK(crc32(0, "123456789", 9) == 0xCBF43926u);
  CHECK(crc32(crc32(0, "12345", 5), "6789", 4) == 0xCBF43926u);
  CHECK(crc32(0, "", 0) == 0);
}

TEST("strict JSON is read and anything else refused") {
  Json json;
  const std::string good =
      " {\"a\": [1, -2.5e3, true, null], \"b\\u00e9\\n\": \"\\ud83d\\ude00\", \"c\": {}} ";
  REQUIRE(parse_json(good.data(), good.size(), &json));
  CHECK(json.find("a")->items.size() == 4);
  CHECK(json.find("a")->items[0].integral && json.find("a")->items[0].integer == 1);
  CHECK(json.find("a")->items[1].number == -2500 && !json.find("a")->items[1].integral);
  CHECK(*json.find_text("b\xc3\xa9\n") == "\xf0\x9f\x98\x80");
  for (const char* bad :
       {"", "{", "[1,]", "{\"a\":1,}", "01", "1.", "+1", "nul", "\"\\x\"", "\"\x01\"", "[1] 2", "\"\\ud800\"",
        "\"\xc0\x80\"", "\"\xed\xa0\x80\"", "\"a", "{1:2}", "'a'", "-", "1e"}) {
    if (parse_json(bad, std::strlen(bad), &json)) {
      std::printf("  accepted %s\n", bad);
      CHECK(false);
    }
  }
  const std::string deep(100, '[');
  CHECK(!parse_json(deep.data(), deep.size(), &json));
}

int main() { return run_tests(); }
