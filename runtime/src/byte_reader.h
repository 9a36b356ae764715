// Reads little-endian values from untrusted bytes. The first read past the end makes the reader fail for
// good; values are zero from then on, so callers check `failed()` once per record instead of once per field.
#ifndef POCKC_SRC_BYTE_READER_H_
#define POCKC_SRC_BYTE_READER_H_

#include <cstdint>
#include <cstring>
#include <string>

namespace pockc {

class ByteReader {
 public:
  ByteReader(const uint8_t* data, uint64_t size) : data_(data), size_(size) {}

  bool failed() const { return failed_; }
  uint64_t remaining() const { return size_ - position_; }
  void set_failed() { failed_ = true; }

  uint8_t u8() { return read<uint8_t>(); }
  uint32_t u32() { return read<uint32_t>(); }
  uint64_t u64() { return read<uint64_t>(); }
  int64_t i64() { return read<int64_t>(); }
  double f64() { return read<double>(); }

  // A count of items that take at least `item_bytes` each: fails when there are more than `limit`, or more
  // than the bytes left can hold, so that a table is never larger than a small multiple of the file.
  uint32_t count(uint32_t limit, uint64_t item_bytes) {
    const uint32_t value = u32();
    if (value > limit || value > remaining() / item_bytes) set_failed();
    return failed_ ? 0 : value;
  }

  // Past a list, without reading it; returns its length.
  uint32_t skip_list(uint32_t limit, uint64_t item_bytes) {
    const uint32_t length = count(limit, item_bytes);
    position_ += length * item_bytes;
    return length;
  }

  // A string without NUL inside.
  std::string text(uint32_t limit) {
    const uint32_t length = count(limit, 1);
    if (failed_) return std::string();
    const char* begin = reinterpret_cast<const char*>(data_ + position_);
    if (std::memchr(begin, 0, length) != nullptr) set_failed();
    position_ += length;
    return failed_ ? std::string() : std::string(begin, length);
  }

 private:
  // The format is little-endian, as is every machine that this runs on; a port to another one swaps here.
  template <typename T>
  T read() {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "swap bytes here");
    T value{};
    if (failed_ || remaining() < sizeof(T)) {
      failed_ = true;
      return value;
    }
    std::memcpy(&value, data_ + position_, sizeof(T));
    position_ += sizeof(T);
    return value;
  }

  const uint8_t* data_;
  uint64_t size_;
  uint64_t position_ = 0;
  bool failed_ = false;
};

}  // namespace pockc

#endif  // POCKC_SRC_BYTE_READER_H_
