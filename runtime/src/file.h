// Files: mapped for reading, written through a table of functions so that tests can make the disk fail.
#ifndef POCKC_SRC_FILE_H_
#define POCKC_SRC_FILE_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

#include "pockc/kernel.h"

namespace pockc {

// A whole file, mapped read-only and private. Pages come in when they are touched, and can be dropped again.
class MappedFile {
 public:
  MappedFile() = default;
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // PK_NOT_FOUND when there is no such file, PK_IO_ERROR when it cannot be read, PK_BAD_FILE when it is empty
  // or no regular file. Once per object.
  Status open(const char* path);
  // Bytes of the caller instead, which must outlive the object: for tests, whose sanitizers then see where
  // they end to the byte.
  void borrow(const uint8_t* data, size_t size);

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  // Gives back the memory of pages that were read; they are read again when needed.
  void drop_pages() const;

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
  bool borrowed_ = false;
};

// What writes, and files that are written in place, need of the system; the signatures and results are those
// of POSIX.
struct FileSystem {
  int (*open)(const char* path, int flags, mode_t mode);
  ssize_t (*write)(int file, const void* data, size_t size);
  int (*fsync)(int file);
  int (*close)(int file);
  int (*rename)(const char* from, const char* to);
  int (*unlink)(const char* path);
  ssize_t (*pread)(int file, void* data, size_t size, off_t offset);
  ssize_t (*pwrite)(int file, const void* data, size_t size, off_t offset);
  int (*ftruncate)(int file, off_t size);
};

const FileSystem& posix_file_system();

// Replaces `path` as a whole or not at all: writes `path`.tmp, syncs it, renames it, syncs the directory.
// Whatever fails, the old file stays as it was and the temporary one is removed.
class AtomicWriter {
 public:
  explicit AtomicWriter(const FileSystem& system) : system_(system) {}
  ~AtomicWriter();  // removes the temporary file unless commit() succeeded
  AtomicWriter(const AtomicWriter&) = delete;
  AtomicWriter& operator=(const AtomicWriter&) = delete;

  Status open(const char* path);
  Status write(const void* data, size_t size);
  Status commit();

 private:
  Status failed(const char* action);
  Status sync_directory();

  const FileSystem& system_;
  char* path_ = nullptr;
  char* temporary_ = nullptr;
  int file_ = -1;
  bool exists_ = false;  // the temporary file
};

}  // namespace pockc

#endif  // POCKC_SRC_FILE_H_
