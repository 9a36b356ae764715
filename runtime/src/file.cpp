#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "error.h"

namespace pockc {

MappedFile::~MappedFile() {
  if (data_ != nullptr && !borrowed_) munmap(const_cast<uint8_t*>(data_), size_);
}

Status MappedFile::open(const char* path) {
  const int file = ::open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    const int code = errno;
    const Status status = code == ENOENT || code == ENOTDIR ? PK_NOT_FOUND : PK_IO_ERROR;
    return fail(status, "cannot open %s: %s", path, std::strerror(code));
  }
  struct stat information;
  void* address = MAP_FAILED;
  const bool usable =
      fstat(file, &information) == 0 && S_ISREG(information.st_mode) && information.st_size > 0;
  if (usable) address = mmap(nullptr, information.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  const int code = errno;
  ::close(file);
  if (!usable) return fail(PK_BAD_FILE, "%s is empty or not a regular file", path);
  if (address == MAP_FAILED) return fail(PK_IO_ERROR, "cannot map %s: %s", path, std::strerror(code));
  data_ = static_cast<const uint8_t*>(address);
  size_ = static_cast<size_t>(information.st_size);
  return PK_OK;
}

void MappedFile::borrow(const uint8_t* data, size_t size) {
  data_ = data;
  size_ = size;
  borrowed_ = true;
}

void MappedFile::drop_pages() const {
  if (data_ != nullptr && !borrowed_) madvise(const_cast<uint8_t*>(data_), size_, MADV_DONTNEED);
}

const FileSystem& posix_file_system() {
  static const FileSystem system = {
      [](const char* path, int flags, mode_t mode) { return ::open(path, flags, mode); },
      ::write,
      ::fsync,
      ::close,
      ::rename,
      ::unlink,
      ::pread,
      ::pwrite,
      ::ftruncate,
  };
  return system;
}

AtomicWriter::~AtomicWriter() {
  if (file_ >= 0) system_.close(file_);
  if (exists_) system_.unlink(temporary_);
  std::free(path_);
  std::free(temporary_);
}

Status AtomicWriter::failed(const char* action) {
  return fail(PK_IO_ERROR, "cannot %s %s: %s; the previous file, if any, is intact", action, path_,
              std::strerror(errno));
}

Status AtomicWriter::open(const char* path) {
  const size_t length = std::strlen(path);
  path_ = static_cast<char*>(std::malloc(length + 1));
  temporary_ = static_cast<char*>(std::malloc(length + 5));
  if (path_ == nullptr || temporary_ == nullptr) return fail(PK_OUT_OF_MEMORY, "no memory for a file name");
  std::memcpy(path_, path, length + 1);
  std::memcpy(temporary_, path, length);
  std::memcpy(temporary_ + length, ".tmp", 5);
  file_ = system_.open(temporary_, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file_ < 0) return failed("create a temporary file for");
  exists_ = true;
  return PK_OK;
}

Status AtomicWriter::write(const void* data, size_t size) {
  const char* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = system_.write(file_, bytes, size);
    if (written < 0 && errno == EINTR) continue;
    if (written == 0) errno = ENOSPC;  // a device that takes nothing more
    if (written <= 0) return failed("write");
    bytes += written;
    size -= static_cast<size_t>(written);
  }
  return PK_OK;
}

Status AtomicWriter::commit() {
  if (system_.fsync(file_) != 0) return failed("sync");
  const int file = file_;
  file_ = -1;
  if (system_.close(file) != 0) return failed("close");
  if (system_.rename(temporary_, path_) != 0) return failed("replace");
  exists_ = false;
  return sync_directory();
}

// Without this a power cut may bring the old name back. The rename itself is done: the new file is whole.
Status AtomicWriter::sync_directory() {
  char* slash = std::strrchr(temporary_, '/');
  if (slash != nullptr) slash[slash == temporary_ ? 1 : 0] = '\0';
  const int directory =
      system_.open(slash == nullptr ? "." : temporary_, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  if (directory < 0) return PK_OK;  // a directory that may be written but not read cannot be synced
  const int result = system_.fsync(directory);
  const int code = errno;
  system_.close(directory);
  // Some network and FUSE file systems do not sync directories: EINVAL then, and nothing better can be done.
  if (result == 0 || code == EINVAL || code == ENOTSUP) return PK_OK;
  return fail(PK_IO_ERROR, "%s is written, but its directory could not be synced: %s", path_,
              std::strerror(code));
}

}  // namespace pockc
