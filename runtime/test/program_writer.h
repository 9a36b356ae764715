// Writes small .pock files for tests, and a temporary directory to put them in.
#ifndef POCKC_TEST_PROGRAM_WRITER_H_
#define POCKC_TEST_PROGRAM_WRITER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "program.h"

namespace pockc::test {

// A call with its own lists, and an entry of such calls; the loaded ones have one array for all of an entry.
struct WrittenCall {
  uint32_t op = 0;
  uint32_t origin = 0;
  std::vector<uint32_t> inputs;
  std::vector<uint32_t> outputs;
  std::vector<int64_t> ints;
  std::vector<double> floats;
  uint64_t workspace_offset = 0;
  uint64_t workspace_bytes = 0;
};

struct WrittenEntry {
  std::string name;
  std::vector<Argument> inputs;
  std::vector<Argument> outputs;
  std::vector<WrittenCall> calls;
};

// The tables of a program; `bytes()` lays them out as FORMAT.md says, checksums included.
struct ProgramWriter {
  uint64_t state_bytes = 0;
  uint64_t arena_bytes = 0;
  uint32_t max_threads = 2;
  uint32_t accumulation = 1;
  std::vector<TensorRecord> tensors;
  std::vector<StateRecord> states;
  std::vector<std::string> strings;
  std::vector<WrittenEntry> entries;
  std::string data;
  std::string golden;
  std::string metadata = "{\"model\": \"test\"}";
  uint8_t hash_seed = 1;

  // Each returns the index of the new tensor.
  uint32_t transient(DType dtype, const std::vector<int64_t>& dims);
  uint32_t constant(DType dtype, const std::vector<int64_t>& dims, const void* contents);
  // States come before transients. `dims` and `initial` are as stored.
  uint32_t state(const std::string& name, StateKind kind, DType dtype, const std::vector<int64_t>& dims,
                 const void* initial, const std::vector<uint8_t>& permutation = {});

  WrittenCall call(const std::string& op, const std::vector<uint32_t>& inputs,
                   const std::vector<uint32_t>& outputs, const std::vector<int64_t>& ints = {},
                   const std::vector<double>& floats = {});

  std::string program_section() const;
  std::string bytes() const;

 private:
  uint32_t intern(const std::string& text);
  uint64_t append_data(const void* contents, uint64_t size);
  uint32_t append_tensor(DType dtype, const std::vector<int64_t>& dims, Storage storage);
};

// The file around a program section.
std::string make_file(const std::string& metadata, const std::string& program, const std::string& data,
                      const std::string& golden, uint8_t hash_seed);

// A regression of batch 2 and 4 features: the weights move towards the mean of the samples. Entries
// train_step and eval_step (pixel_values f32[2,4], labels i64[2]), infer (pixel_values); outputs loss f32[]
// and logits f32[2,4]. States: weight f32[4], table f32[3,2] stored as [2,3], pockc.step i64[],
// pockc.learning_rate f32[], frozen f32[4].
ProgramWriter mean_program(uint32_t accumulation = 1);

// A directory that is removed with its files at the end of the scope.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  std::string path(const std::string& name) const { return directory_ + "/" + name; }
  std::vector<std::string> list() const;

 private:
  std::string directory_;
};

void write_file(const std::string& path, const std::string& contents);
std::string read_file(const std::string& path);

}  // namespace pockc::test

#endif  // POCKC_TEST_PROGRAM_WRITER_H_
