// What was computed of samples, in a file of slots. FORMAT.md has its layout.
#ifndef POCKC_CLI_CACHE_FILE_H_
#define POCKC_CLI_CACHE_FILE_H_

#include <string>
#include <vector>

#include "file.h"

namespace pockc::cli {

// Nothing is synced: a slot is believed only if its checksum, which no other contents, sample or key has,
// says so. After a power cut, or on a worn-out card, slots are missing, and no slot is wrong.
class CacheFile {
 public:
  // What the contents depend on: a file of another key is overwritten.
  struct Key {
    uint64_t fingerprint = 0;
    int64_t samples = 0;
    uint64_t record_bytes = 0;
  };

  explicit CacheFile(const FileSystem& system) : system_(system) {}
  ~CacheFile();
  CacheFile(const CacheFile&) = delete;
  CacheFile& operator=(const CacheFile&) = delete;

  // Opens or makes the file, which no other process may have open, to grow to at most `limit` bytes: the
  // samples with the lowest numbers have slots. Without room for one there is no file. Once per object.
  Status open(const std::string& path, const Key& key, uint64_t limit);

  // Whether there is something to read.
  bool has(int64_t sample) const { return sample < slots_ && checksums_[static_cast<size_t>(sample)] != 0; }
  // False: nothing is there that can be believed.
  bool read(int64_t sample, uint8_t* record);
  // Does nothing for samples without a slot. A write that fails is reported once, and ends all writing.
  void write(int64_t sample, const uint8_t* record);

  // The most that the file may take.
  uint64_t most_bytes() const { return slots_ == 0 ? 0 : offset_of(slots_); }
  uint64_t written_bytes() const { return written_bytes_; }

 private:
  Status refuse(const char* what) const;
  Status lock() const;
  Status start(const std::string& header);
  bool read_all(uint64_t offset, void* out, size_t size) const;
  bool write_all(uint64_t offset, const void* data, size_t size);
  uint32_t checksum(int64_t sample, const uint8_t* record) const;
  uint64_t offset_of(int64_t sample) const;

  const FileSystem& system_;
  std::string path_;
  Key key_;
  int file_ = -1;
  int64_t slots_ = 0;
  bool writes_ = true;
  std::vector<uint32_t> checksums_;  // by sample; 0: none
  uint64_t written_bytes_ = 0;
};

}  // namespace pockc::cli

#endif  // POCKC_CLI_CACHE_FILE_H_
