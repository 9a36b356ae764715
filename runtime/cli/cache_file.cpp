#include "cache_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "crc32.h"
#include "error.h"

namespace pockc::cli {
namespace {

constexpr uint64_t kHeaderBytes = 64;
constexpr char kMagic[] = "\x89PKC\r\n\x1a";  // with its NUL
constexpr uint32_t kVersion = 1;

template <typename T>
void put(std::string* out, T value) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "swap bytes here");
  out->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

std::string header_of(const CacheFile::Key& key) {
  std::string header(kMagic, sizeof(kMagic));
  put<uint32_t>(&header, kVersion);
  put<uint64_t>(&header, key.fingerprint);
  put<int64_t>(&header, key.samples);
  put<uint64_t>(&header, key.record_bytes);
  header.resize(kHeaderBytes - 4, '\0');
  put<uint32_t>(&header, crc32(0, header.data(), header.size()));
  return header;
}

}  // namespace

CacheFile::~CacheFile() {
  if (file_ >= 0) system_.close(file_);
}

Status CacheFile::refuse(const char* what) const {
  return fail(PK_IO_ERROR, "cannot %s %s: %s", what, path_.c_str(), std::strerror(errno));
}

// Slots follow the table of checksums, at a multiple of 64.
uint64_t CacheFile::offset_of(int64_t sample) const {
  const uint64_t table = (4 * static_cast<uint64_t>(key_.samples) + 63) / 64 * 64;
  return kHeaderBytes + table + static_cast<uint64_t>(sample) * key_.record_bytes;
}

Status CacheFile::open(const std::string& path, const Key& key, uint64_t limit) {
  path_ = path;
  key_ = key;
  const uint64_t head = offset_of(0);
  const uint64_t room = limit < head ? 0 : (limit - head) / std::max<uint64_t>(key.record_bytes, 1);
  slots_ = static_cast<int64_t>(std::min<uint64_t>(room, static_cast<uint64_t>(key.samples)));
  if (slots_ == 0) return PK_OK;
  // No link leads out of the directory; a pipe does not make the run wait.
  file_ = system_.open(path.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0644);
  if (file_ < 0) return refuse("open the cache");
  struct stat information;
  if (fstat(file_, &information) != 0 || !S_ISREG(information.st_mode))
    return fail(PK_BAD_FILE, "%s is not a regular file: remove it", path.c_str());
  POCKC_TRY(lock());
  checksums_.assign(static_cast<size_t>(key.samples), 0);
  const std::string header = header_of(key);
  std::string found(kHeaderBytes, '\0');
  const uint64_t size = static_cast<uint64_t>(information.st_size);
  if (!read_all(0, &found[0], kHeaderBytes) || found != header) return start(header);
  if (size > most_bytes() && system_.ftruncate(file_, static_cast<off_t>(most_bytes())) != 0)
    return refuse("shorten the cache");
  const uint64_t known = size < kHeaderBytes ? 0 : (size - kHeaderBytes) / 4;  // less than all: cut off
  const size_t count = static_cast<size_t>(std::min<uint64_t>(known, checksums_.size()));
  if (!read_all(kHeaderBytes, checksums_.data(), 4 * count)) return refuse("read the cache");
  return PK_OK;
}

Status CacheFile::lock() const {
  if (flock(file_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK)
    return PK_OK;  // not every system has locks
  return fail(PK_INVALID_ARGUMENT, "%s is in use by another run: give each its own --cache-prefix directory",
              path_.c_str());
}

// What was in the file is of another key, and so are its checksums, should a power cut bring it back.
Status CacheFile::start(const std::string& header) {
  if (system_.ftruncate(file_, 0) != 0) return refuse("empty the cache");
  return write_all(0, header.data(), header.size()) ? PK_OK : refuse("write the cache");
}

bool CacheFile::read_all(uint64_t offset, void* out, size_t size) const {
  char* to = static_cast<char*>(out);
  while (size > 0) {
    const ssize_t count = system_.pread(file_, to, size, static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    to += count;
    offset += static_cast<uint64_t>(count);
    size -= static_cast<size_t>(count);
  }
  return true;
}

bool CacheFile::write_all(uint64_t offset, const void* data, size_t size) {
  const char* from = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t count = system_.pwrite(file_, from, size, static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count == 0) errno = ENOSPC;
    if (count <= 0) return false;
    from += count;
    offset += static_cast<uint64_t>(count);
    size -= static_cast<size_t>(count);
    written_bytes_ += static_cast<uint64_t>(count);
  }
  return true;
}

// Never 0, which says that there is none.
uint32_t CacheFile::checksum(int64_t sample, const uint8_t* record) const {
  const uint64_t place[2] = {key_.fingerprint, static_cast<uint64_t>(sample)};
  const uint32_t sum = crc32(crc32(0, place, sizeof(place)), record, key_.record_bytes);
  return sum == 0 ? 1 : sum;
}

bool CacheFile::read(int64_t sample, uint8_t* record) {
  if (!has(sample)) return false;
  uint32_t& expected = checksums_[static_cast<size_t>(sample)];
  if (read_all(offset_of(sample), record, key_.record_bytes) && checksum(sample, record) == expected)
    return true;
  expected = 0;
  return false;
}

void CacheFile::write(int64_t sample, const uint8_t* record) {
  if (sample >= slots_ || !writes_) return;
  const uint32_t sum = checksum(sample, record);
  const uint64_t place = kHeaderBytes + 4 * static_cast<uint64_t>(sample);
  writes_ = write_all(offset_of(sample), record, key_.record_bytes) && write_all(place, &sum, sizeof(sum));
  if (writes_) {
    checksums_[static_cast<size_t>(sample)] = sum;
    return;
  }
  std::fprintf(stderr, "pock-run: cannot write %s: %s; what is not in it is computed each time\n",
               path_.c_str(), std::strerror(errno));
}

}  // namespace pockc::cli
