// What the fuzz targets share. Each target is a file with
//   LLVMFuzzerTestOneInput   one input: any bytes in, any status out, never a crash or a sanitizer's report;
//   fuzz_seeds               small valid inputs to start from;
//   fuzz_focus               the part of an input that most changes shall hit.
// Clang's libFuzzer drives them, or driver.cpp with any compiler.
#ifndef POCKC_FUZZ_FUZZ_H_
#define POCKC_FUZZ_FUZZ_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "program.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace pockc::fuzz {

std::vector<std::string> fuzz_seeds();
// Puts them into a directory, a file each; returns the exit status.
int write_seeds(const std::string& directory);

struct Focus {
  size_t begin = 0;
  size_t size = 0;
};
Focus fuzz_focus(const std::string& input);

// A copy that starts at a page, as a mapped file does, and ends where its bytes end: a read behind them is
// seen.
class PageCopy {
 public:
  PageCopy(const uint8_t* data, size_t size);
  ~PageCopy();
  PageCopy(const PageCopy&) = delete;
  PageCopy& operator=(const PageCopy&) = delete;

  uint8_t* data() { return data_; }
  size_t size() const { return size_; }
  Bytes bytes() const { return Bytes{data_, size_}; }

 private:
  uint8_t* data_;
  size_t size_;
};

template <typename T>
T get(const uint8_t* at) {
  T value;
  __builtin_memcpy(&value, at, sizeof(T));
  return value;
}

template <typename T>
void put(uint8_t* at, T value) {
  __builtin_memcpy(at, &value, sizeof(T));
}

}  // namespace pockc::fuzz

#endif  // POCKC_FUZZ_FUZZ_H_
