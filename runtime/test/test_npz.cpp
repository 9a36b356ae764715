// The .npz reader and writer, and the decompressor, against good and hostile files.
#include <cstring>
#include <random>

#include "check.h"
#include "dataset.h"
#include "inflate.h"
#include "npz.h"
#include "program_writer.h"

using namespace pockc;
using namespace pockc::test;
using namespace pockc::cli;

namespace {

std::string from_hex(const std::string& hex) {
  std::string out;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    out.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return out;
}

const uint8_t* bytes_of(const std::string& text) { return reinterpret_cast<const uint8_t*>(text.data()); }

// "0 squared is 0; 1 squared is 1; ..." up to 59, packed by zlib with dynamic codes.
std::string squares() {
  std::string text;
  for (int i = 0; i < 60; ++i) text += std::to_string(i) + " squared is " + std::to_string(i * i) + "; ";
  return text;
}
constexpr const char* kPackedSquares =
    "5d934b6e05210c04afc211f00f06cd6922258b2c93a7dc3ff4aca8b7c4b2eceaa6dddbebe7efe3f7ebb37dbf5abf9b9d6fbb"
    "9b9fefbc5b9cef75b744ffb85b9d05afbb8db310bb6362e49e719d85b197acb3706d0aeb58d3054a525717602df7240bf2ed"
    "6d46e4b5898cd0a2b6411dea02b85f9a05f4706d5cd42b0f419fa277d067aa8b565f7b9683be7c6f74d0d7dc5c0efa217a07"
    "fd78ba403f9f59a09fcf465a2fae00fd127d807e4963d0fb2e2b82e677391674df646c14bf520a62b0a66f0a48b0d06fc6f5"
    "f6e7da0b1156ca463241433292111a4a5a52c7541c933a2e6536df52a4602763d4a5239923d3892483e45df3a0c3a36b2f74"
    "78f6cd579db9948e820e1f4f1f74f8d4bc0a06587b0b3a7c3d270c1df1e8289eb1496fcdb7f46b1e2f22e45ff124523eff03";
// "abcabcabcabcabcabc", packed with the fixed codes.
constexpr const char* kPackedFixed = "4b4c4a4e444500";

// The arrays point into x and labels.
std::vector<NumpyArray> sample_arrays(const std::vector<float>& x, const std::vector<int64_t>& labels) {
  NumpyArray a{"pixel_values",
               NumpyType::kF32,
               {static_cast<int64_t>(x.size() / 4), 4},
               reinterpret_cast<const uint8_t*>(x.data()),
               x.size() * 4};
  NumpyArray b{"labels",
               NumpyType::kI64,
               {static_cast<int64_t>(labels.size())},
               reinterpret_cast<const uint8_t*>(labels.data()),
               labels.size() * 8};
  return {a, b};
}

}  // namespace

TEST("deflate streams with dynamic, fixed and no codes are expanded") {
  const std::string packed = from_hex(kPackedSquares), wanted = squares();
  std::string out(wanted.size(), '\0');
  CHECK(inflate(bytes_of(packed), packed.size(), reinterpret_cast<uint8_t*>(&out[0]), out.size()));
  CHECK(out == wanted);
  const std::string fixed = from_hex(kPackedFixed);
  std::string small(18, '\0');
  CHECK(inflate(bytes_of(fixed), fixed.size(), reinterpret_cast<uint8_t*>(&small[0]), small.size()));
  CHECK(small == "abcabcabcabcabcabc");
  const std::string stored(
      "\x01\x03\x00\xfc\xff"
      "abc",
      8);
  CHECK(inflate(bytes_of(stored), stored.size(), reinterpret_cast<uint8_t*>(&small[0]), 3));
  CHECK(small.substr(0, 3) == "abc");
}

TEST("damaged deflate streams never write or read outside") {
  const std::string packed = from_hex(kPackedSquares);
  const size_t size = squares().size();
  std::vector<uint8_t> out(size);
  for (size_t length = 0; length < packed.size(); ++length) {
    const std::string cut = packed.substr(0, length);
    const std::vector<uint8_t> exact(cut.begin(), cut.end());
    CHECK(!inflate(exact.data(), exact.size(), out.data(), out.size()));
  }
  CHECK(!inflate(bytes_of(packed), packed.size(), out.data(), size - 1));
  std::mt19937 random(3);
  for (int round = 0; round < 20000; ++round) {
    std::string changed = packed;
    changed[random() % changed.size()] = static_cast<char>(random());
    inflate(bytes_of(changed), changed.size(), out.data(), out.size());
  }
}

TEST("an archive that was written can be read") {
  TemporaryDirectory directory;
  const std::vector<float> x = {1, 2, 3, 4, 5, 6, 7, 8};
  const std::vector<int64_t> labels = {3, -1};
  REQUIRE(write_npz(directory.path("a.npz"), sample_arrays(x, labels)) == PK_OK);
  Npz npz;
  REQUIRE(npz.open(directory.path("a.npz")) == PK_OK);
  REQUIRE(npz.arrays().size() == 2 && npz.find("labels") != nullptr);
  CHECK(npz.find("pixel_values")->describe() == "float32[2,4]");
  CHECK(std::memcmp(npz.find("pixel_values")->data, x.data(), 32) == 0);
  CHECK(std::memcmp(npz.find("labels")->data, labels.data(), 16) == 0);
  CHECK(npz.find("nothing") == nullptr);
}

TEST("damaged archives are refused or read, never worse") {
  TemporaryDirectory directory;
  const std::vector<float> x(8, 1.0f);
  const std::vector<int64_t> labels = {0, 1};
  REQUIRE(write_npz(directory.path("a.npz"), sample_arrays(x, labels)) == PK_OK);
  const std::string bytes = read_file(directory.path("a.npz"));
  for (size_t length = 0; length < bytes.size(); ++length) {
    write_file(directory.path("b.npz"), bytes.substr(0, length));
    Npz npz;
    if (npz.open(directory.path("b.npz")) == PK_OK) CHECK(false && "a cut off archive was accepted");
  }
  for (size_t i = 0; i < bytes.size(); ++i) {
    for (const int value : {0, 1, 0x7F, 0xFF}) {
      std::string changed = bytes;
      changed[i] = static_cast<char>(value);
      write_file(directory.path("b.npz"), changed);
      Npz npz;
      npz.open(directory.path("b.npz"));
    }
  }
}

TEST("what a program cannot take is said with names, shapes and dtypes") {
  TemporaryDirectory directory;
  write_file(directory.path("model.pock"), mean_program().bytes());
  Program program;
  REQUIRE(load_program(directory.path("model.pock").c_str(), &program) == PK_OK);
  const EntryRecord& entry = *program.find_entry("train_step");
  const std::vector<float> x(12, 1.0f);
  const std::vector<int64_t> labels = {0, 1, 2};
  const std::string path = directory.path("a.npz");
  const auto open = [&](const std::vector<NumpyArray>& arrays) {
    write_npz(path, arrays);
    Dataset data;
    return data.open(path, program, entry);
  };
  std::vector<NumpyArray> arrays = sample_arrays(x, labels);
  CHECK(open(arrays) == PK_OK);
  arrays[0].name = "x";
  CHECK(open(arrays) == PK_NOT_FOUND);
  CHECK(contains(pk_last_error(),
                 "no array `pixel_values`; the program wants pixel_values float32[2,4], labels int64[2]"));
  CHECK(contains(pk_last_error(), "the file has x float32[3,4], labels int64[3]"));
  arrays[0].name = "pixel_values";
  arrays[0].shape = {4, 3};
  CHECK(open(arrays) == PK_TYPE_MISMATCH);
  CHECK(contains(pk_last_error(), "has shape [4,3], `train_step` of this program wants [samples,4]"));
  const std::vector<int64_t> fewer = {0, 1};
  arrays = sample_arrays(x, fewer);
  CHECK(open(arrays) == PK_TYPE_MISMATCH);
  CHECK(contains(pk_last_error(), "`labels` has 2 samples"));
  arrays = sample_arrays(x, labels);
  arrays[1].type = NumpyType::kF64;
  CHECK(open(arrays) == PK_TYPE_MISMATCH);
  CHECK(contains(pk_last_error(), "dtype float64, the program wants int64"));
}

TEST("NaN and infinity are found with their sample, and other dtypes are converted") {
  TemporaryDirectory directory;
  write_file(directory.path("model.pock"), mean_program().bytes());
  Program program;
  REQUIRE(load_program(directory.path("model.pock").c_str(), &program) == PK_OK);
  const EntryRecord& entry = *program.find_entry("train_step");
  std::vector<float> x(12, 1.0f);
  x[9] = __builtin_nanf("");
  const std::vector<int64_t> labels = {0, 1, 2};
  const std::string path = directory.path("a.npz");
  REQUIRE(write_npz(path, sample_arrays(x, labels)) == PK_OK);
  Dataset data;
  REQUIRE(data.open(path, program, entry) == PK_OK);
  Session session;
  REQUIRE(session.create(program, SessionSettings()) == PK_OK);
  const int64_t good[] = {0, 1}, bad[] = {1, 2};
  CHECK(data.gather(good, &session) == PK_OK);
  CHECK(data.gather(bad, &session) == PK_INVALID_ARGUMENT);
  CHECK(contains(pk_last_error(), "`pixel_values` holds NaN in sample 2"));
  // uint8 images and int32 labels.
  std::vector<uint8_t> bytes = {0, 1, 2, 255, 4, 5, 6, 7};
  const std::vector<int32_t> narrow = {7, -100};
  NumpyArray a{"pixel_values", NumpyType::kU8, {2, 4}, bytes.data(), 8};
  NumpyArray b{"labels", NumpyType::kI32, {2}, reinterpret_cast<const uint8_t*>(narrow.data()), 8};
  REQUIRE(write_npz(path, {a, b}) == PK_OK);
  Dataset converted;
  REQUIRE(converted.open(path, program, entry) == PK_OK);
  REQUIRE(converted.gather(good, &session) == PK_OK);
  pk_tensor place;
  REQUIRE(session.input("train_step", "pixel_values", &place) == PK_OK);
  CHECK(converted.tensors()[0].data == place.data);
  CHECK(static_cast<const float*>(converted.tensors()[0].data)[3] == 255.0f);
  REQUIRE(converted.integers("labels") != nullptr);
  CHECK(converted.integers("labels")[1] == -100);
}

TEST("the order of samples is a permutation that depends on seed and epoch") {
  std::vector<int64_t> a(100), b(100), c(100), d(100);
  shuffle(1, 0, &a);
  shuffle(1, 0, &b);
  shuffle(1, 1, &c);
  shuffle(2, 0, &d);
  CHECK(a == b && a != c && a != d && c != d);
  std::vector<bool> seen(100);
  for (const int64_t i : a) seen[static_cast<size_t>(i)] = true;
  for (const bool s : seen) CHECK(s);
}

int main() { return run_tests(); }
