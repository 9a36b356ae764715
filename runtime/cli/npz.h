// NumPy's .npz files: a zip archive of .npy arrays. Stored arrays (numpy.savez) stay in the mapping, so a
// large file is never copied; compressed ones (numpy.savez_compressed) are expanded into memory.
#ifndef POCKC_CLI_NPZ_H_
#define POCKC_CLI_NPZ_H_

#include <memory>
#include <string>
#include <vector>

#include "file.h"
#include "program.h"

namespace pockc::cli {

enum class NumpyType : uint8_t { kF32, kF64, kI64, kI32, kU8, kBool };

const char* numpy_type_name(NumpyType type);
size_t numpy_type_size(NumpyType type);

struct NumpyArray {
  std::string name;
  NumpyType type = NumpyType::kF32;
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;  // row-major, of any alignment
  uint64_t bytes = 0;
  uint32_t crc = 0;  // of the member of the archive, header included

  std::string describe() const;  // `float32[100,3,32,32]`
};

class Npz {
 public:
  // Checks the archive, every checksum and every header.
  Status open(const std::string& path);
  // The same from memory that outlives the object; `what` names it in messages.
  Status open_bytes(const std::string& what, Bytes bytes);

  const std::string& path() const { return path_; }
  const std::vector<NumpyArray>& arrays() const { return arrays_; }
  const NumpyArray* find(const std::string& name) const;

 private:
  struct Member;
  Status read();
  Status read_directory(std::vector<Member>* members) const;
  Status locate(const Member& member, Bytes* out) const;
  Status expand(const Member& member, Bytes packed, Bytes* out);
  Status read_array(const Member& member, Bytes bytes);

  std::string path_;
  MappedFile file_;
  std::vector<NumpyArray> arrays_;
  std::vector<std::unique_ptr<uint8_t[]>> expanded_;
};

// Writes arrays, stored, as a new file that appears whole or not at all.
Status write_npz(const std::string& path, const std::vector<NumpyArray>& arrays);

}  // namespace pockc::cli

#endif  // POCKC_CLI_NPZ_H_
